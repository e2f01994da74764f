"""Tar shards: written with an index beside them, read by index, and foreign tars read with care.

A shard of ours is `NAME.tar` (members `KEY.ext`, WebDataset's convention) and `NAME.json`: count,
bytes, sha256 and each member's offset. The index is written last, so a tar without one is
unfinished. Same samples, same bytes.
"""

import bz2
import gzip
import hashlib
import io
import json
import lzma
import os
import tarfile
import unicodedata
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Protocol, TypeVar, cast

from cluster.command import shown
from cluster.manifest import FolderError, give_name, temporary, write_json
from cluster.settings import UserError

TAR_ENDINGS = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
TEXT_ENDINGS = ("txt", "caption", "cap", "json")
KEY_BYTES = 90  # with its ending a name must fit the 100 bytes of a ustar header
# A tar of others may ask for any amount of memory (a few MB of gzip unpack to GB): far above what pairs need.
SAMPLE_BYTES, TEXT_BYTES, PADDING_BYTES = 256 << 20, 8 << 20, 64 << 20

Place = tuple[int, int]  # (offset, bytes) of a member's content
T = TypeVar("T")


class ShardError(UserError):
    """A tar that is damaged or holds what no shard should."""


@dataclass(frozen=True)
class Sample:
    """The files of one key: `files["txt"]` is the content of `KEY.txt`."""

    key: str
    files: dict[str, bytes]


class Origin(Protocol):
    """Where a shard that is not on this machine comes from."""

    def open(self) -> BinaryIO: ...

    def prefetch(self) -> None: ...


@dataclass(frozen=True)
class Shard:
    """A tar whose samples are read by number: where each sample's members lie."""

    path: Path
    keys: list[str]
    places: list[dict[str, Place]] = field(repr=False)  # a sample: ending -> (offset, bytes)
    origin: Origin | None = field(default=None, repr=False, compare=False)  # None: the tar lies at `path`

    def __len__(self) -> int:
        return len(self.keys)

    def open(self) -> BinaryIO:
        """The tar, to be read at `places`; fetched first if it is remote, and kept in the cache while open."""
        return self.origin.open() if self.origin else open(self.path, "rb")

    def prefetch(self) -> None:
        """Begin to fetch the tar in a thread if it is remote and not here yet; returns at once."""
        if self.origin:
            self.origin.prefetch()

    def read(self, number: int) -> Sample:
        """Sample `number` of the shard, read by offset; ShardError if the tar is shorter than its index."""
        return Sample(self.keys[number], self._read(number, self.places[number]))

    def read_text(self, number: int) -> str:
        """The caption of sample `number`, without its other members; ShardError if it has none in UTF-8."""
        name = f"{shown(self.path)}: sample {shown(self.keys[number])}"
        if "txt" not in self.places[number]:
            raise ShardError(f"{name} has no txt, only {shown(', '.join(self.places[number]))}")
        try:
            return self._read(number, {"txt": self.places[number]["txt"]})["txt"].decode()
        except UnicodeDecodeError as error:
            raise ShardError(f"{name} has a txt that is not UTF-8 ({error.reason})") from None

    def _read(self, number: int, wanted: dict[str, Place]) -> dict[str, bytes]:
        with self.open() as file:
            files = {ending: os.pread(file.fileno(), n, at) for ending, (at, n) in wanted.items()}
        for ending, (_, n) in wanted.items():
            if len(files[ending]) != n:
                name = shown(f"{self.keys[number]}.{ending}")
                raise ShardError(f"{shown(self.path)} is shorter than its index says: {name} is cut")
        return files


def plain_key(name: str) -> str:
    """A KEY out of any name: no folders, dots (WebDataset cuts at the first), control or broken bytes; not too long."""
    text = name.removeprefix("./").encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    if not text.isprintable():  # a key is a line of ledgers and reports: no line ends, no terminal codes
        text = "".join("_" if unicodedata.category(c) in ("Cc", "Zl", "Zp") else c for c in text)
    key = text.replace("/", "_").replace(".", "_") or "_"
    whole = key.encode()
    if len(whole) > KEY_BYTES:
        digest = hashlib.sha256(whole).hexdigest()[:16]
        key = f"{whole[: KEY_BYTES - 17].decode(errors='ignore')}-{digest}"
    return key


def write_shard(path: Path, samples: Iterable[Sample]) -> Shard | None:
    """Write samples as `path` and its index; None, and no file, if there are no samples.

    Several processes may write the same shard at once, if they write the same samples.
    """
    part = temporary(path)
    keys: list[str] = []
    places: list[dict[str, Place]] = []
    try:
        with open(part, "w+b") as file:  # by name it may be gone already: another writer may sweep it away
            with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
                for sample in samples:
                    keys.append(sample.key)
                    places.append({end: _add(tar, f"{sample.key}.{end}", data) for end, data in sample.files.items()})
            file.flush()
            os.fsync(file.fileno())
            n_bytes = file.seek(0, os.SEEK_END)
            file.seek(0)
            index = {"count": len(keys), "bytes": n_bytes, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
    except OSError:  # a full disk
        part.unlink(missing_ok=True)
        raise
    if not keys:
        part.unlink(missing_ok=True)
        return None
    if not give_name(part, path) and not path.is_file():
        raise FolderError(f"{shown(path)} was removed while it was written; run the same command again")
    write_json(path.with_suffix(".json"), index | {"samples": [list(row) for row in zip(keys, places, strict=True)]})
    return Shard(path, keys, places)


def open_shard(path: Path, origin: Origin | None = None) -> Shard:
    """A finished shard of ours, by its index; FolderError if tar or index is missing or damaged.

    With an origin the tar need not be there, only its index.
    """
    index_path = path.with_suffix(".json")
    try:
        index = json.loads(index_path.read_bytes())
        n_bytes = index["bytes"]
        keys = [key for key, _ in index["samples"]]
        places = [checked_places(place, n_bytes) for _, place in index["samples"]]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise FolderError(f"{shown(index_path)}, the index of {path.name}, cannot be read: {error}") from None
    if origin is None and (not path.is_file() or path.stat().st_size != n_bytes):
        found = f"{path.stat().st_size} bytes" if path.is_file() else "no file"
        raise FolderError(f"{shown(path)} is cut or changed: {found}, its index says {n_bytes} bytes")
    return Shard(path, keys, places, origin)


def index_record(path: Path) -> dict[str, Any]:
    """The bytes and sha256 of a shard that was just written, from its index."""
    index = json.loads(path.with_suffix(".json").read_bytes())
    return {"bytes": index["bytes"], "sha256": index["sha256"]}


def checked_places(place: dict[str, list[int]], n_bytes: int) -> dict[str, Place]:
    """A sample's places as an index file has them; ValueError if one lies outside of a tar of `n_bytes`."""
    if any(at < 0 or n < 0 or at + n > n_bytes for at, n in place.values()):
        raise ValueError(f"a member at {place} lies outside of the tar's {n_bytes} bytes")
    return {ending: (at, n) for ending, (at, n) in place.items()}


def read_foreign(path: Path, name: str = "") -> Iterator[Sample]:
    """Samples of any WebDataset tar, in file order, compressed or not; `name` is what errors call it.

    Adjacent members that share the name up to the first dot are one sample, until an ending repeats.
    Ends with ShardError when the tar is cut, garbled or empty: tarfile and webdataset stop there in
    silence. ShardError too at a link, a device, a name that leaves its folder, a sparse file, and at
    a sample or text so large that it must be an attack. What no tar can tell is a flip inside the
    data of an uncompressed one, and that a member is missing: the sample then lacks that ending.
    """
    with open(path, "rb") as file:
        for key, files in walk(file, name or shown(path), _content):
            yield Sample(key, files)


def walk(
    file: BinaryIO, name: str, take: Callable[["_Bounded", tarfile.TarInfo], T]
) -> Iterator[tuple[str, dict[str, T]]]:
    """(key, ending -> what `take` makes of the member) of each sample of a tar, as read_foreign gives them."""
    count = 0
    try:
        stream = _Bounded(_unpacked(file), name)
        with tarfile.open(fileobj=stream, mode="r:") as tar:
            for sample in _grouped(stream, tar, take):
                count += 1
                yield sample
            _check_end(stream, tar.offset, count)
    except (tarfile.TarError, EOFError, OSError, zlib.error, lzma.LZMAError, ValueError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        reason = shown((str(error) or type(error).__name__).splitlines()[0].rstrip(":"))
        raise ShardError(f"{name} is truncated or not a tar after {count} samples ({reason}); fetch it again") from None
    if count == 0:
        raise ShardError(f"{name} is an empty shard")


class _Bounded(io.RawIOBase):
    """The bytes of a tar; refuses to read more at once than a sample may hold, whatever a header asks for."""

    def __init__(self, file: BinaryIO, tar: str) -> None:
        self.file, self.tar = file, tar

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= SAMPLE_BYTES:
            raise ShardError(
                f"{self.tar}: a header asks for {size} bytes at once; refused, the tar is damaged or hostile"
            )
        return self.file.read(size)

    def seek(self, at: int, whence: int = 0) -> int:
        return self.file.seek(at, whence)

    def tell(self) -> int:
        return self.file.tell()


def compression_of(file: BinaryIO) -> str:
    """gzip, bzip2, xz, or "" for none; by the first bytes, never by the file's name."""
    start = file.read(6)
    file.seek(0)
    magic = {"gzip": b"\x1f\x8b", "bzip2": b"BZh", "xz": b"\xfd7zXZ\0"}
    return next((name for name, mark in magic.items() if start.startswith(mark)), "")


def _unpacked(file: BinaryIO) -> BinaryIO:
    kind = compression_of(file)
    if kind == "gzip":
        return cast(BinaryIO, gzip.GzipFile(fileobj=file))
    if kind == "bzip2":
        return cast(BinaryIO, bz2.BZ2File(file))
    return cast(BinaryIO, lzma.LZMAFile(file)) if kind == "xz" else file


def _content(stream: _Bounded, member: tarfile.TarInfo) -> bytes:
    stream.seek(member.offset_data)
    data = stream.read(member.size)
    if len(data) != member.size:
        raise tarfile.ReadError("unexpected end of data")
    return data


def _grouped(
    stream: _Bounded, tar: tarfile.TarFile, take: Callable[[_Bounded, tarfile.TarInfo], T]
) -> Iterator[tuple[str, dict[str, T]]]:
    key = ""
    files: dict[str, T] = {}
    n_bytes = 0
    while (member := tar.next()) is not None:
        tar.members.clear()  # type: ignore[attr-defined]  # or it keeps the header of every member
        if member.isdir():
            continue
        stem, ending = _split(member.name)
        if files and (stem != key or ending in files):
            yield key, files
            files, n_bytes = {}, 0
        n_bytes += member.size + tarfile.BLOCKSIZE
        _refuse_odd(member, ending, n_bytes, stream.tar)
        key = stem
        files[ending] = take(stream, member)
    if files:
        yield key, files


def _refuse_odd(member: tarfile.TarInfo, ending: str, n_bytes: int, tar: str) -> None:
    """ShardError for what no shard should hold; n_bytes is the size of the member's sample so far."""
    name = f"{tar}: member '{shown(member.name)}'"
    if not member.isfile() or member.name.startswith("/") or ".." in member.name.split("/"):
        raise ShardError(f"{name} is a link, a device or leaves its folder; refused: make the tar without it")
    if member.size < 0:
        raise ShardError(f"{name} claims {member.size} bytes; refused: the tar is damaged or hostile")
    if member.issparse():
        raise ShardError(f"{name} is stored with holes (sparse); refused: make the tar without --sparse")
    if ending in TEXT_ENDINGS and member.size > TEXT_BYTES:
        raise ShardError(
            f"{name} is a text of {member.size} bytes, more than {TEXT_BYTES}; refused: make the tar without it"
        )
    if n_bytes > SAMPLE_BYTES:
        raise ShardError(
            f"{name} makes a sample of {n_bytes} bytes, more than {SAMPLE_BYTES}; refused: make the tar without it"
        )


def _split(name: str) -> tuple[str, str]:
    folder, _, base = name.rpartition("/")
    stem, _, ending = base.partition(".")
    return f"{folder}/{stem}" if folder else stem, ending.lower()


def _check_end(stream: _Bounded, at: int, count: int) -> None:
    """A whole tar ends with a block of zeros, and zeros; anything else means that it was cut or garbled there.

    Reading to the end also makes gzip check its checksum.
    """
    stream.seek(at)
    block = stream.read(tarfile.BLOCKSIZE)
    if len(block) < tarfile.BLOCKSIZE or any(block):
        raise ShardError(f"{stream.tar} is truncated or garbled after {count} samples (no end mark); fetch it again")
    padding = 0
    while block:
        block = stream.read(1 << 20)
        padding += len(block)
        if block.strip(b"\0"):
            raise ShardError(
                f"{stream.tar} goes on behind its end mark after {count} samples (tars joined with cat?); "
                "name the tars one by one"
            )
        if padding > PADDING_BYTES:
            raise ShardError(f"{stream.tar} ends in more than {PADDING_BYTES} zeros; refused: it is damaged or hostile")


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> tuple[int, int]:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    at = tar.offset + tarfile.BLOCKSIZE
    tar.addfile(member, io.BytesIO(data))
    return at, len(data)
