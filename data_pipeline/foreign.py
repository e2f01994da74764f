"""Tars made by others, read in exact order without preprocess: one careful pass makes an index of each.

The index is kept in a folder beside the run. It is made again when the tar has changed or the index
is damaged; processes that make it at the same time do not disturb each other.
"""

import hashlib
import json
import tarfile
from pathlib import Path
from typing import Any, BinaryIO

from cluster.command import shown
from cluster.manifest import FolderError, Manifest, fingerprint_of
from data_pipeline.folders import Folder, open_folders
from data_pipeline.remote import CacheConfig, plain
from data_pipeline.remote_cache import RemoteFile, write_whole
from data_pipeline.shards import Place, Shard, ShardError, checked_places, compression_of, plain_key, walk
from data_pipeline.sources import find_files, remote_tars

FORMAT = 1  # raise it when a reader of the old form would misread the new one


def open_foreign(source: str, cache_folder: Path, cache: CacheConfig | None = None) -> list[Shard]:
    """All tars of a source, by index, in a fixed order; their keys are those that preprocess would give.

    `source` is a folder of tars, a tar, or a brace pattern `x{000..041}.tar`; as a URL too: each tar is
    then fetched once to be indexed, and again when it is read and no longer in `cache`. FolderError
    if there is no tar. ShardError names the first damaged tar, with the names of the others.
    """
    tars: list[Path | RemoteFile] = [*remote_tars(source, cache or CacheConfig())]
    if not tars:
        tars = [*find_files(source)[0]]
    if not tars:
        raise FolderError(f"{shown(source)} holds no tar; pairs in loose files go through `smalti preprocess`")
    shards, damaged = [], []
    for tar in tars:
        try:
            shards.append(index_of(tar, cache_folder))
        except ShardError as error:
            damaged.append((shown(tar.name), str(error)))
    if damaged:
        others = f"; damaged too: {', '.join(name for name, _ in damaged[1:])}" if damaged[1:] else ""
        raise ShardError(f"{len(damaged)} of {len(tars)} tars cannot be used: {damaged[0][1]}{others}")
    return shards


class ForeignFolder:
    """Tars made by others, seen as a finished images/ folder: `Shards([ForeignFolder(...)], "images", "train")`."""

    def __init__(self, train: str, heldout: str, cache_folder: Path, cache: CacheConfig | None = None) -> None:
        """Sources of the two splits as of `open_foreign`, which says what is raised; heldout may be "" for none."""
        sources = {"train": train, "heldout": heldout}
        self._shards = {
            split: open_foreign(source, cache_folder, cache) if source else [] for split, source in sources.items()
        }
        files = {
            f"{split}-{number:06d}": {"sha256": hashlib.sha256(_body(shard.keys, shard.places, 0)).hexdigest()}
            for split, shards in self._shards.items()
            for number, shard in enumerate(shards)
        }
        counts = {split: sum(map(len, shards)) for split, shards in self._shards.items()}
        self.manifest = Manifest("images", {}, counts, files, {}, fingerprint_of("images", files))

    def shards(self, split: str) -> list[Shard]:
        """The split's shards in the order of `open_foreign`."""
        return self._shards[split]


def open_images(images: str, heldout: str, index_folder: Path, cache: CacheConfig) -> list[Folder]:
    """Picture shards that a trainer's settings name: finished images/ folders, or with `heldout` tars made by others,
    whose indexes are kept in `index_folder`. Raises what `open_folders` and `ForeignFolder` do."""
    if heldout:
        return [ForeignFolder(images, heldout, index_folder, cache)]
    return open_folders(images, "images", cache)


def index_of(tar: Path | RemoteFile, cache_folder: Path) -> Shard:
    """The samples of a foreign tar by offset, as `read_foreign` finds them: adjacent members of one name.

    Read from the index in `cache_folder`, or from the headers of the tar, which are all visited once.
    ShardError as of `read_foreign`, and if the tar is compressed (it has no offsets), or a key comes
    twice (a member stored twice, or a tar that is not sorted). A sample that lacks its picture or
    caption is kept: who reads it finds what is missing. A flip inside the data of a member cannot be
    found, as a plain tar has no digest of it.
    """
    if isinstance(tar, RemoteFile):
        identity: list[Any] = [tar.url, tar.sha256]
    else:
        about = tar.stat()
        identity = [str(tar.absolute()), about.st_size, about.st_mtime_ns]
    digest = hashlib.sha256(str(identity[0]).encode("utf-8", "surrogateescape")).hexdigest()
    kept = cache_folder / f"{digest[:24]}.index"
    found = _read_index(kept, identity)
    if found is None:
        with tar.open() if isinstance(tar, RemoteFile) else open(tar, "rb") as file:
            found = _make_index(file, plain(tar.url) if isinstance(tar, RemoteFile) else shown(tar))
        cache_folder.mkdir(parents=True, exist_ok=True)
        write_whole(kept, _as_lines(identity, *found))
    keys, places, n_bytes = found
    if isinstance(tar, RemoteFile):
        return Shard(Path(plain(tar.url)), keys, places, RemoteFile(tar.url, tar.cache, n_bytes, tar.sha256))
    return Shard(tar, keys, places)


Index = tuple[list[str], list[dict[str, Place]], int]  # keys, places and bytes of a tar


def _make_index(file: BinaryIO, name: str) -> Index:
    packed = compression_of(file)
    if packed:
        raise ShardError(
            f"{name} is compressed with {packed}, so it cannot be read by offset; unpack it, or use `smalti preprocess`"
        )
    numbers: dict[str, int] = {}
    places: list[dict[str, Place]] = []
    for stem, files in walk(file, name, lambda _, member: _place(member)):
        key = plain_key(stem)
        if key in numbers:
            raise ShardError(
                f"{name}: the files of sample {key} are not together, or one is there twice (samples {numbers[key]} "
                f"and {len(places)}); make the tar again, sorted by name"
            )
        numbers[key] = len(places)
        places.append(files)
    return [*numbers], places, file.seek(0, 2)


def _place(member: tarfile.TarInfo) -> Place:
    return member.offset_data, member.size


def _as_lines(identity: list[Any], keys: list[str], places: list[dict[str, Place]], n_bytes: int) -> bytes:
    """Two lines: of which tar, with the digest of the second line; and what lies where."""
    body = _body(keys, places, n_bytes)
    head = {"format": FORMAT, "of": identity, "sha256": hashlib.sha256(body).hexdigest()}
    return json.dumps(head).encode() + b"\n" + body + b"\n"


def _body(keys: list[str], places: list[dict[str, Place]], n_bytes: int) -> bytes:
    return json.dumps({"bytes": n_bytes, "samples": list(zip(keys, places, strict=True))}).encode()


def _read_index(path: Path, identity: list[Any]) -> Index | None:
    """The kept index; None if there is none, it is damaged, or the tar is another one now."""
    try:
        head, body = path.read_bytes().splitlines()
        about = json.loads(head)
        if (about["format"], about["of"], about["sha256"]) != (FORMAT, identity, hashlib.sha256(body).hexdigest()):
            return None
        values = json.loads(body)
        samples = values["samples"]
        return [key for key, _ in samples], [checked_places(p, values["bytes"]) for _, p in samples], values["bytes"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
