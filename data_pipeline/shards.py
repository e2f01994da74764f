"""Tar shards: written with an index beside them, read by index, and foreign tars read with care.

A shard of ours is `NAME.tar` (members `KEY.ext`, WebDataset's convention) and `NAME.json`: count,
bytes, sha256 and each member's offset. The index is written last, so a tar without one is
unfinished. Same samples, same bytes.
"""

import hashlib
import io
import json
import lzma
import os
import tarfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from cluster.manifest import FolderError, file_digest, write_json
from cluster.settings import UserError

TAR_ENDINGS = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
KEY_BYTES = 90  # with its ending a name must fit the 100 bytes of a ustar header


class ShardError(UserError):
    """A tar that is damaged or holds what no shard should."""


@dataclass(frozen=True)
class Sample:
    """The files of one key: `files["txt"]` is the content of `KEY.txt`."""

    key: str
    files: dict[str, bytes]


@dataclass(frozen=True)
class Shard:
    """A finished shard of ours: where each sample's members lie."""

    path: Path
    keys: list[str]
    places: list[dict[str, tuple[int, int]]] = field(repr=False)  # a sample: ending -> (offset, bytes)

    def __len__(self) -> int:
        return len(self.keys)

    def read(self, number: int) -> Sample:
        """Sample `number` of the shard, read by offset; ShardError if the tar is shorter than its index."""
        return Sample(self.keys[number], self._read(number, self.places[number]))

    def read_text(self, number: int) -> str:
        """The caption of sample `number`, without its other members."""
        return self._read(number, {"txt": self.places[number]["txt"]})["txt"].decode()

    def _read(self, number: int, wanted: dict[str, tuple[int, int]]) -> dict[str, bytes]:
        with open(self.path, "rb") as file:
            files = {ending: os.pread(file.fileno(), n, at) for ending, (at, n) in wanted.items()}
        for ending, (_, n) in wanted.items():
            if len(files[ending]) != n:
                raise ShardError(f"{self.path} is shorter than its index says: {self.keys[number]}.{ending} is cut")
        return files


def plain_key(name: str) -> str:
    """A KEY out of any name: no folders, dots (WebDataset cuts at the first) or broken bytes, and not too long."""
    text = name.removeprefix("./").encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    key = text.replace("/", "_").replace(".", "_") or "_"
    whole = key.encode()
    if len(whole) > KEY_BYTES:
        digest = hashlib.sha256(whole).hexdigest()[:16]
        key = f"{whole[: KEY_BYTES - 17].decode(errors='ignore')}-{digest}"
    return key


def write_shard(path: Path, samples: Iterable[Sample]) -> Shard | None:
    """Write samples as `path` and its index; None, and no file, if there are no samples."""
    part = path.with_name(path.name + ".part")
    keys: list[str] = []
    places: list[dict[str, tuple[int, int]]] = []
    with tarfile.open(part, "w", format=tarfile.USTAR_FORMAT) as tar:
        for sample in samples:
            keys.append(sample.key)
            places.append({ending: _add(tar, f"{sample.key}.{ending}", data) for ending, data in sample.files.items()})
    if not keys:
        part.unlink()
        return None
    part.replace(path)
    index = {
        "count": len(keys),
        "bytes": path.stat().st_size,
        "sha256": file_digest(path),
        "samples": [[key, place] for key, place in zip(keys, places, strict=True)],
    }
    write_json(path.with_suffix(".json"), index)
    return Shard(path, keys, places)


def open_shard(path: Path) -> Shard:
    """A finished shard of ours, by its index; FolderError if tar or index is missing or damaged."""
    index_path = path.with_suffix(".json")
    try:
        index = json.loads(index_path.read_text())
        samples = [(key, {e: (at, n) for e, (at, n) in place.items()}) for key, place in index["samples"]]
        n_bytes = index["bytes"]
    except (OSError, ValueError, KeyError) as error:
        raise FolderError(f"{index_path}, the index of {path.name}, cannot be read: {error}") from None
    if not path.is_file() or path.stat().st_size != n_bytes:
        found = f"{path.stat().st_size} bytes" if path.is_file() else "no file"
        raise FolderError(f"{path} is cut or changed: {found}, its index says {n_bytes} bytes")
    return Shard(path, [key for key, _ in samples], [place for _, place in samples])


def is_finished(path: Path) -> bool:
    """True if the shard and its index are there and fit in size."""
    try:
        open_shard(path)
    except FolderError:
        return False
    return True


def read_foreign(path: Path) -> Iterator[Sample]:
    """Samples of any WebDataset tar, in file order, compressed or not.

    Adjacent members that share the name up to the first dot are one sample, until an ending repeats.
    Ends with ShardError when the tar is cut, garbled or empty: tarfile and webdataset stop there in
    silence.
    """
    count = 0
    try:
        with tarfile.open(path) as tar:
            for sample in _grouped(path, tar):
                count += 1
                yield sample
            _check_end(path, tar, count)
    except (tarfile.TarError, EOFError, OSError, zlib.error, lzma.LZMAError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        reason = (str(error) or type(error).__name__).splitlines()[0].rstrip(":")
        raise ShardError(f"{path} is truncated or not a tar after {count} samples ({reason})") from None
    if count == 0:
        raise ShardError(f"{path} is an empty shard")


def _grouped(path: Path, tar: tarfile.TarFile) -> Iterator[Sample]:
    key = ""
    files: dict[str, bytes] = {}
    for member in tar:
        if member.isdir():
            continue
        if not member.isfile() or member.name.startswith("/") or ".." in member.name.split("/"):
            raise ShardError(f"{path}: member {member.name!r} is a link or leaves its folder; refused")
        stem, ending = _split(member.name)
        if files and (stem != key or ending in files):
            yield Sample(key, files)
            files = {}
        key = stem
        content = tar.extractfile(member)
        files[ending] = content.read() if content else b""
    if files:
        yield Sample(key, files)


def _split(name: str) -> tuple[str, str]:
    folder, _, base = name.rpartition("/")
    stem, _, ending = base.partition(".")
    return f"{folder}/{stem}" if folder else stem, ending.lower()


def _check_end(path: Path, tar: tarfile.TarFile, count: int) -> None:
    """A whole tar ends with a block of zeros, and zeros; anything else means that it was cut or garbled there.

    Reading to the end also makes gzip check its checksum.
    """
    file = tar.fileobj
    assert file is not None
    file.seek(tar.offset)
    block = file.read(512)
    if len(block) < 512 or any(block):
        raise ShardError(f"{path} is truncated or garbled after {count} samples (no end mark)")
    while block:
        block = file.read(1 << 20)
        if block.strip(b"\0"):
            raise ShardError(f"{path} goes on behind its end mark after {count} samples (tars joined with cat?)")


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> tuple[int, int]:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    at = tar.offset + tarfile.BLOCKSIZE
    tar.addfile(member, io.BytesIO(data))
    return at, len(data)
