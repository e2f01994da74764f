"""The finished folders that a run reads, one or several, as one set of samples addressed by (shard, number)."""

import hashlib
import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from cluster.command import shown
from cluster.manifest import VERB_OF, FolderError, Manifest, check_files, read_manifest
from cluster.settings import SettingError
from data_pipeline.open_files import OpenFiles
from data_pipeline.remote import CacheConfig, is_remote
from data_pipeline.remote_cache import RemoteFolder
from data_pipeline.shards import Sample, Shard, ShardError, open_shard

JOINT = "::"  # stands between folders that are read together, as in WebDataset's shard lists
ADDED = ("train", "heldout", "captions_by_tokens")  # counts of folders that add up
ALIKE = ("codebook", "grid")  # counts in which folders that are read together must agree
MADE_ALIKE = ("dvae", "vocab")  # what they must have been made with alike


class Folder(Protocol):
    """A finished folder, on this machine or another."""

    manifest: Manifest

    def shards(self, split: str) -> list[Shard]:
        """The split's shards in the order of their names."""


class LocalFolder:
    """A finished folder of this machine; every file is there in its size."""

    def __init__(self, path: Path, kind: str) -> None:
        self.path = path
        self.manifest = read_manifest(path, kind)
        try:
            check_files(path, self.manifest)
        except FolderError as error:
            raise FolderError(
                f"{error}; put back a copy of the file, or remove {path} and run `smalti {VERB_OF[kind]}` again"
            ) from None

    def shards(self, split: str) -> list[Shard]:
        return [open_shard(self.path / name) for name in shard_names(self.manifest, split)]


class IndexedFolder:
    """A finished folder of this machine whose tars may be damaged: only its indexes are read."""

    def __init__(self, path: Path, kind: str) -> None:
        self.path = path
        self.manifest = read_manifest(path, kind)

    def shards(self, split: str) -> list[Shard]:
        return [self._indexed(self.path / name) for name in shard_names(self.manifest, split)]

    def _indexed(self, path: Path) -> Shard:
        index = path.with_suffix(".json")
        try:
            samples = json.loads(index.read_text())["samples"]
            return Shard(path, [key for key, _ in samples], [place for _, place in samples])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise FolderError(f"{index}, the index of {path.name}, cannot be read: {error}") from None


class Shards:
    """All samples of one split of a folder, or of several in their order."""

    def __init__(self, folder: Path | Sequence[Folder], kind: str, split: str) -> None:
        """FolderError if a folder is not finished, damaged, has no such split, or does not fit the others."""
        folders = [LocalFolder(folder, kind)] if isinstance(folder, Path) else list(folder)
        self.manifest = joined([each.manifest for each in folders])
        self.sources: list[list[Shard]] = []
        for each in folders:
            self.sources.append(each.shards(split))
            if not self.sources[-1] and (len(folders) == 1 or split == "train"):
                files = ", ".join(each.manifest.files) or "nothing"
                raise FolderError(f"{getattr(each, 'path', 'a folder')} has no {split} shards (it holds: {files})")
        self.shards: list[Shard] = [shard for shards in self.sources for shard in shards]
        if not self.shards:
            raise FolderError(f"none of {len(folders)} folders has {split} shards")
        self._files = OpenFiles()

    @property
    def sizes(self) -> list[int]:
        return [len(shard) for shard in self.shards]

    @property
    def source_sizes(self) -> list[list[int]]:
        """Of each folder the sizes of its shards."""
        return [[len(shard) for shard in shards] for shards in self.sources]

    def __len__(self) -> int:
        return sum(self.sizes)

    def read(self, place: tuple[int, int]) -> Sample:
        """The sample at (shard, number). ShardError if the tar ends before it, OSError if it cannot be read."""
        shard, number = self.shards[place[0]], place[1]
        try:
            return Sample(shard.keys[number], self._files.read(shard, number))
        except ShardError as error:
            raise ShardError(f"{self.name(place)}: {error}") from None

    def name(self, place: tuple[int, int]) -> str:
        """File and key of the sample at (shard, number), for a message."""
        shard = self.shards[place[0]]
        return f"{shown(shard.path)}, sample {shown(shard.keys[place[1]])}"

    def __iter__(self) -> Iterator[Sample]:
        """Every sample once, in the order of the files; several folders take turns."""
        turns = itertools.zip_longest(*(map(self.read, self._places(source)) for source in range(len(self.sources))))
        return (sample for turn in turns for sample in turn if sample is not None)

    def _places(self, source: int) -> Iterator[tuple[int, int]]:
        first = sum(len(shards) for shards in self.sources[:source])
        for number, shard in enumerate(self.sources[source], first):
            yield from ((number, sample) for sample in range(len(shard)))


def shard_names(manifest: Manifest, split: str) -> list[str]:
    """Names of a split's tars, in the order in which they are numbered."""
    return sorted(name for name in manifest.files if name.startswith(f"{split}-"))


def open_folders(text: str, kind: str, cache: CacheConfig, whole: bool = True) -> list[Folder]:
    """The folders that a setting names, here or remote: "data/a::s3://bucket/b" are two.

    With whole=False the tars of folders of this machine may be missing or damaged. FolderError if one
    is not finished; SettingError if one is named twice.
    """
    names = [name.strip() for name in text.split(JOINT)]
    if not all(names) or len(set(names)) < len(names):
        raise SettingError(f"{text!r} must name folders, each once, with {JOINT} between them")
    local = LocalFolder if whole else IndexedFolder
    return [RemoteFolder(name, kind, cache) if is_remote(name) else local(Path(name), kind) for name in names]


def joined(manifests: Sequence[Manifest]) -> Manifest:
    """One manifest for folders that are read together; of a single folder its own.

    FolderError if they were made with different dVAEs or vocabularies, or differ in their codes.
    """
    first = manifests[0]
    if len(manifests) == 1:
        return first
    for what, names, values in (
        ("made with different", MADE_ALIKE, [m.made_from for m in manifests]),
        ("of different", ALIKE, [m.counts for m in manifests]),
    ):
        for name in names:
            if any(value.get(name) != values[0].get(name) for value in values):
                found = ", ".join(str(value.get(name, "none"))[:12] for value in values)
                raise FolderError(f"folders that are read together are {what} {name} ({found}); make them alike")
    counts = {name: first.counts[name] for name in ALIKE if name in first.counts}
    counts |= {name: _added([m.counts[name] for m in manifests if name in m.counts]) for name in ADDED}
    files = {f"{n}/{name}": record for n, m in enumerate(manifests) for name, record in m.files.items()}
    made_from = {name: first.made_from[name] for name in MADE_ALIKE if name in first.made_from}
    for name in sorted({name for m in manifests for name in m.made_from} - made_from.keys()):
        made_from[name] = _digest([m.made_from.get(name, "") for m in manifests])
    return Manifest(
        first.kind, {}, counts, files, made_from, _digest([m.fingerprint for m in manifests]), first.versions
    )


def _added(counts: list[Any]) -> Any:
    """The sum of numbers, or of lists of numbers term by term."""
    if not counts or isinstance(counts[0], int):
        return sum(counts)
    return [sum(terms) for terms in itertools.zip_longest(*counts, fillvalue=0)]


def _digest(parts: list[str]) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
