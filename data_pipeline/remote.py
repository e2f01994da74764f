"""The only door to other machines: URL in, bytes out, with pauses and new attempts after faults that may pass.

http(s) goes through the standard library, every other protocol (s3://, gs://, ...) through fsspec,
loaded at first use. No URL is ever given to a shell.
"""

import contextlib
import importlib
import re
import ssl
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.error import URLError
from urllib.parse import urlsplit

from cluster.command import shown
from cluster.manifest import FolderError
from cluster.settings import SettingError, UserError, require_at_least_one, setting
from data_pipeline.shards import TAR_ENDINGS, ShardError

CHUNK = 4 << 20
MAX_INDEX_BYTES = 256 << 20  # a manifest or an index: text that is read into memory
FIRST_WAIT, LONGEST_WAIT = 1.0, 60.0  # seconds between attempts: doubled each time
TRY_AGAIN = (408, 425, 429)  # the answers "4xx" that a later attempt may change
GONE = (404, 410)
NOT_THERE = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)

T = TypeVar("T")


class RemoteError(UserError):
    """A remote file that cannot be had now or from here: no fault of the data, so none may be left out for it."""


class DamageError(Exception):
    """Bytes came that are not the ones expected."""


@dataclass(frozen=True)
class CacheConfig:
    """Where files of other machines are kept."""

    folder: str = setting("", "fetched files are kept here, best on a local disk; empty: ~/.cache/smalti")
    gb: float = setting(50.0, "at most this many GB of them; the least recently used make room, what is open stays")
    tries: int = setting(5, "attempts at a file before giving up, with pauses of 1, 2, 4, ... seconds")
    timeout: int = setting(60, "seconds without an answer after which an attempt over http has failed")

    def __post_init__(self) -> None:
        require_at_least_one(self, ("tries", "timeout"), "cache.")
        if self.gb <= 0:
            raise SettingError(f"cache.gb={self.gb} must be above 0")

    def made(self, kind: str) -> Path:
        """The folder in it for files of a kind, made if need be; only its owner may look into it."""
        path = (Path(self.folder) if self.folder else Path.home() / ".cache" / "smalti") / kind
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        return path


def is_remote(source: str) -> bool:
    """True for a URL. FolderError for what would need a shell or fsspec's chains of URLs."""
    if source.startswith("pipe:"):
        raise FolderError(f"{shown(source)}: smalti runs no shell commands; name a file, or a URL such as s3://...")
    if re.search(r"::[A-Za-z][A-Za-z0-9+.-]*://", source):
        raise FolderError(f"{shown(source)}: chained URLs (::) are not read; name the innermost one")
    if not re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", source):
        return False
    try:
        urlsplit(source)
    except ValueError as error:
        raise FolderError(f"{shown(source)} is no URL: {error}") from None
    return True


def plain(url: str) -> str:
    """A URL as it may be printed: without password, signature or terminal codes."""
    parts = urlsplit(url)
    host = parts.netloc.rpartition("@")[2]
    return shown(f"{parts.scheme}://{host}{parts.path}" + ("?..." if parts.query else ""))


def is_tar(url: str) -> bool:
    return urlsplit(url).path.endswith(TAR_ENDINGS)


def find_tars(url: str, cache: CacheConfig) -> list[str]:
    """URLs of all tars below a remote folder, sorted; FolderError if there are none, or over http."""
    if url.startswith(("http:", "https:")):
        raise FolderError(f"{plain(url)}: http lists no folders; name the tars: {plain(url)}/x{{000..041}}.tar")
    system, path = file_system(url)
    found = attempt(url, cache, lambda: sorted(system.unstrip_protocol(name) for name in system.find(path)))
    tars = [name for name in found if is_tar(name) and "/_tmp/" not in name]
    if not tars:
        raise FolderError(f"{plain(url)} holds no tar (loose pictures are read from folders of this machine only)")
    return tars


def fetch_bytes(url: str, cache: CacheConfig) -> bytes:
    """A small file, not kept. ShardError if it is not there; RemoteError if not allowed, or all attempts failed."""

    def get() -> bytes:
        with source_of(url, cache.timeout) as (read, expected):
            data = b""
            while len(data) <= MAX_INDEX_BYTES and (chunk := read(CHUNK)):
                data += chunk
        if len(data) > MAX_INDEX_BYTES:
            raise ShardError(f"{plain(url)} is larger than {MAX_INDEX_BYTES} bytes; that is no manifest or index")
        if expected is not None and len(data) < expected:
            raise ConnectionError(f"the answer ended after {len(data)} of {expected} bytes")
        return data

    return attempt(url, cache, get)


def attempt(url: str, cache: CacheConfig, get: Callable[[], T]) -> T:
    """`get()`, again after faults that may pass. ShardError if nothing is there, RemoteError at other faults."""
    for left in reversed(range(cache.tries)):
        try:
            return get()
        except (UserError, DamageError):
            raise
        except Exception as error:  # each protocol raises what its library does
            if getattr(error, "filename", None) is not None and not isinstance(error, (*NOT_THERE, URLError)):
                raise  # a disk of this machine, no fault of the source: named as everywhere
            reason = shown((str(error) or type(error).__name__).splitlines()[0])
            if isinstance(error, FileNotFoundError) or getattr(error, "code", None) in GONE:
                raise ShardError(f"{plain(url)} is not there ({reason})") from None
            if not _may_pass(error):
                raise RemoteError(f"{plain(url)} cannot be read: {reason}") from None
            if not left:
                raise RemoteError(
                    f"{plain(url)} could not be fetched in {cache.tries} attempts: {reason}; "
                    "run the same command again to go on, or raise cache.tries"
                ) from None
            wait = min(LONGEST_WAIT, FIRST_WAIT * 2 ** (cache.tries - 1 - left))
            print(f"smalti: {plain(url)}: {reason}; trying again in {wait:g} s", file=sys.stderr)
            time.sleep(wait)
    raise AssertionError("unreachable: there is at least one attempt")


def _may_pass(error: Exception) -> bool:
    code = getattr(error, "code", getattr(error, "status", None))  # of urllib, of aiohttp
    if isinstance(code, int):
        return code >= 500 or code in TRY_AGAIN
    reason = getattr(error, "reason", error)
    return not isinstance(
        reason, (*NOT_THERE, ssl.SSLCertVerificationError, ImportError, NotImplementedError, ValueError, TypeError)
    )


@contextlib.contextmanager
def source_of(url: str, timeout: int) -> Iterator[tuple[Callable[[int], bytes], int | None]]:
    """(read(n) -> the next bytes, how many there are if known) of a URL."""
    if url.startswith(("http://", "https://")):
        with urllib.request.urlopen(url, timeout=timeout) as answer:
            yield answer.read, answer.length
    else:
        system, path = file_system(url)
        with system.open(path, "rb") as file:
            yield file.read, getattr(file, "size", None)


def file_system(url: str) -> tuple[Any, str]:
    try:
        return importlib.import_module("fsspec").url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise RemoteError(f"{plain(url)}: {error} (pip install 'smalti[remote]' brings fsspec and s3fs)") from None
