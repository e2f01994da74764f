"""Files of other machines, fetched whole into a cache folder that all processes of a host share.

A file is written under a temporary name, checked against the size and sha256 that its manifest
gives, and renamed. Least recently used files make room, never one that somebody has open. All locks
are the kernel's (flock): a killed process leaves none behind.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import re
import threading
import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO
from urllib.parse import urlsplit

from cluster.command import shown
from cluster.manifest import NAME as MANIFEST
from cluster.manifest import FolderError, read_manifest
from data_pipeline.remote import CHUNK, CacheConfig, DamageError, RemoteError, attempt, fetch_bytes, plain, source_of
from data_pipeline.shards import Shard, ShardError, open_shard

DIGITS = 24  # of the sha256 that names a file of the cache
_prefetching = threading.BoundedSemaphore(2)  # fetches ahead of use that run at once
_begun: set[Path] = set()  # files that are being fetched ahead of use, or wait for it
_lock = threading.Lock()


@dataclass(frozen=True)
class RemoteFile:
    """One file by its URL; with a size and sha256 nothing else is taken for it."""

    url: str
    cache: CacheConfig
    n_bytes: int | None = None
    sha256: str | None = None

    @property
    def name(self) -> str:
        return urlsplit(self.url).path.rpartition("/")[2]

    def open(self) -> BinaryIO:
        """The whole file, from the cache or fetched into it; it stays there while open.

        Without a sha256 a file that was fetched once is taken to stay as it is. RemoteError and
        ShardError as of `fetch_bytes`; ShardError too if it has twice come with another size or digest.
        """
        path = self._path()
        while True:  # until the file was not evicted between its fetch and its opening
            if held := _hold(path):
                if self.n_bytes in (None, os.fstat(held.fileno()).st_size):
                    return held
                held.close()
                path.unlink(missing_ok=True)  # somebody cut it
            self._fetch(path)

    def prefetch(self) -> None:
        """Begin to fetch in a thread, unless it is here or begun; a failure is left to `open`."""
        path = self._path()
        with _lock:
            if path in _begun or path.exists():
                return
            _begun.add(path)
        threading.Thread(target=self._try_to_open, args=(path,), daemon=True).start()

    def _try_to_open(self, path: Path) -> None:
        with _prefetching, contextlib.suppress(Exception), self.open():
            pass
        with _lock:
            _begun.discard(path)

    def _path(self) -> Path:
        digest = hashlib.sha256(f"{self.url}\n{self.sha256}".encode()).hexdigest()[:DIGITS]
        return self.cache.made("files") / f"{digest}-{re.sub(r'[^A-Za-z0-9._-]', '_', self.name)[-60:]}"

    def _fetch(self, path: Path) -> None:
        """Write the file as `path`; does nothing if another process did so while this one waited."""
        part = path.with_name(path.name + ".part")
        with open(part, "ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if path.exists() or not _is_at(file, part):
                return
            try:
                self._download_twice(file)
                os.fsync(file.fileno())
            except BaseException:
                part.unlink()
                raise
            part.replace(path)

    def _download_twice(self, file: BinaryIO) -> None:
        """Download; once more if other bytes came than the manifest says, which may be a fault of the way."""
        for is_last in (False, True):
            try:
                return attempt(self.url, self.cache, lambda: self._download(file))
            except DamageError as damage:
                if is_last:
                    raise ShardError(
                        f"{plain(self.url)}: {damage}, twice; the file there was changed or damaged: upload it again, "
                        "or make its folder again"
                    ) from None

    def _download(self, file: BinaryIO) -> None:
        """One attempt from the first byte on."""
        file.truncate(0)
        digest, n_bytes = hashlib.sha256(), 0
        most = int(self.cache.gb * 1e9) if self.n_bytes is None else self.n_bytes
        with source_of(self.url, self.cache.timeout) as (read, expected):
            self._make_room(expected or 0, file)
            while n_bytes <= most and (chunk := read(CHUNK)):
                _write(file, chunk)
                digest.update(chunk)
                n_bytes += len(chunk)
        if expected is not None and n_bytes < min(expected, most):
            raise ConnectionError(f"the answer ended after {n_bytes} of {expected} bytes")
        if self.n_bytes not in (None, n_bytes):
            raise DamageError(f"it has {expected or n_bytes} bytes, its manifest says {self.n_bytes}")
        if self.sha256 not in (None, digest.hexdigest()):
            raise DamageError(f"it has sha256 {digest.hexdigest()[:16]}..., its manifest says {self.sha256[:16]}...")
        self._make_room(0, file)

    def _make_room(self, n_bytes: int, file: BinaryIO) -> None:
        """Remove least recently used files until `n_bytes` more fit; RemoteError if they alone are too many."""
        limit = int(self.cache.gb * 1e9)
        if max(n_bytes, os.fstat(file.fileno()).st_size) > limit:
            raise RemoteError(f"{plain(self.url)} is larger than the whole cache: raise cache.gb={self.cache.gb:g}")
        found = []
        for path in self.cache.made("files").glob("[0-9a-f]" * DIGITS + "-*"):  # touch nothing that is not ours
            with contextlib.suppress(FileNotFoundError):
                found.append((path.stat().st_mtime, path.stat().st_size, path))
        total = sum(size for _, size, _ in found) + n_bytes
        for _, size, path in sorted(found):
            if total > limit and _remove_unused(path):
                total -= size


class RemoteFolder:
    """A finished folder of ours on another machine: manifest and indexes are fetched at once, tars at first use."""

    def __init__(self, url: str, kind: str, cache: CacheConfig) -> None:
        """FolderError if it is no finished folder of that kind; else as of `fetch_bytes`."""
        self.url, self.cache = url.rstrip("/"), cache
        data = fetch_bytes(f"{self.url}/{MANIFEST}", cache)
        digest = hashlib.sha256(self.url.encode() + data).hexdigest()[:DIGITS]
        self.folder = cache.made("folders") / digest  # manifest.json and indexes, as in a folder on this machine
        self.folder.mkdir(parents=True, exist_ok=True)
        write_whole(self.folder / MANIFEST, data)
        try:
            self.manifest = read_manifest(self.folder, kind)
            for name, record in self.manifest.files.items():
                plain_name = re.fullmatch(r"\w[\w.-]*", name, re.ASCII)  # it becomes a path: no folders, no ".."
                if not (plain_name and isinstance(record["bytes"], int) and len(record["sha256"]) == 64):
                    raise FolderError(f"{MANIFEST} has a wrong row for {shown(name)!r}; make the folder again")
        except (FolderError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise FolderError(f"{plain(url)}: {error}") from None

    def file(self, name: str) -> RemoteFile:
        """A file that the manifest lists, with its size and digest."""
        record = self.manifest.files[name]
        return RemoteFile(f"{self.url}/{name}", self.cache, record["bytes"], record["sha256"])

    def shards(self, split: str) -> list[Shard]:
        """The split's shards in the order of their names; each tar is fetched when it is first read."""
        names = sorted(n for n in self.manifest.files if n.startswith(f"{split}-") and n.endswith(".tar"))
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(self._fetch_index, names))
        return [open_shard(self.folder / name, self.file(name)) for name in names]

    def _fetch_index(self, name: str) -> None:
        index, record = (self.folder / name).with_suffix(".json"), self.manifest.files[name]
        if index.is_file():
            return
        url = f"{self.url}/{index.name}"
        data = fetch_bytes(url, self.cache)
        try:
            values = json.loads(data)
            fits = values["bytes"] == record["bytes"] and values["sha256"] == record["sha256"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise FolderError(f"{plain(url)} is damaged ({error}); upload it again") from None
        if not fits:
            raise FolderError(f"{plain(url)} is the index of another {name} than {MANIFEST} lists; upload both again")
        write_whole(index, data)


def write_whole(path: Path, data: bytes) -> None:
    """Write a file that other processes may be writing too: it is one of theirs or ours, never a mixture."""
    part = path.with_name(f"{path.name}.{uuid.uuid4().hex[:12]}.part")
    part.write_bytes(data)
    part.replace(path)


def _write(file: BinaryIO, chunk: bytes) -> None:
    try:
        file.write(chunk)
        file.flush()
    except OSError as error:
        raise OSError(error.errno, error.strerror, file.name) from None


def _hold(path: Path) -> BinaryIO | None:
    """The cached file, open (the caller closes it), marked as in use and as used just now; None if it is not there."""
    try:
        file = open(path, "rb")  # noqa: SIM115
    except FileNotFoundError:
        return None
    fcntl.flock(file, fcntl.LOCK_SH)
    if not _is_at(file, path):
        file.close()
        return None
    os.utime(file.fileno())
    return file


def _is_at(file: BinaryIO, path: Path) -> bool:
    """True if the open file still is the one of that name."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _remove_unused(path: Path) -> bool:
    """Remove a file of the cache that no process has open; False if one has."""
    with contextlib.suppress(FileNotFoundError), open(path, "rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        path.unlink()
    return True
