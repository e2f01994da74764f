"""Takes the copies out of the shards that the tasks wrote: images/before/ -> images/.

Which picture of several alike is kept depends on their order alone: first those of the folder to
keep clear of, then the held-out ones, then those for training, by shard and place in it. The shards
read here are not changed, so this can be killed anywhere and done again.
"""

import os
import shutil
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from cluster.manifest import differences, give_name, temporary, write_bytes
from cluster.settings import SettingError
from data_pipeline.contents import read_npy
from data_pipeline.convert import (
    BEFORE,
    MARK_BYTES,
    SPLITS,
    PreprocessConfig,
    mark_of,
    marks_bytes,
    marks_path,
)
from data_pipeline.dedupe import copies
from data_pipeline.folders import Folder, joined, open_folders
from data_pipeline.images import IMAGE_ENDINGS, ImageProblem
from data_pipeline.shards import Shard, ShardError, index_record, open_shard, write_shard
from data_pipeline.shares import in_processes

N_EXAMPLES = 5  # copies of a kind that the report names


@dataclass
class Thinned:
    """What is left: the tars with bytes and sha256; and what was taken out: counts, and keys "copy = original"."""

    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    lost: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)


def folders_against(config: PreprocessConfig) -> list[Folder]:
    """The finished images/ folders that this set must share no picture with.

    SettingError if their pictures cannot be equal to ours: they are compared as they are stored.
    """
    folders = open_folders(config.dedupe.against, "images", config.cache) if config.dedupe.against else []
    stored = ["image_side", "image_format"] + ["image_quality"] * (config.image_format != "png")
    ours = {name: getattr(config, name) for name in stored}
    for folder in folders if config.dedupe.near < 0 else ():
        theirs = {name: folder.manifest.settings.get(name, value) for name, value in ours.items()}
        if changed := differences(theirs, ours):
            raise SettingError(
                f"dedupe.exact compares pictures as they are stored, and those of dedupe.against are stored otherwise "
                f"({'; '.join(changed.values())}): use dedupe.near=4, which finds them all the same"
            )
    return folders


def origin_of(against: list[Folder]) -> dict[str, str]:
    """For the manifest: which pictures this set was kept clear of."""
    return {"against": joined([folder.manifest for folder in against]).fingerprint} if against else {}


def thin(config: PreprocessConfig, names: list[str], against: list[Folder]) -> Thinned:
    """Write images/ from the shards of these names in images/before/."""
    images = Path(config.out) / "images"
    names = sorted(names, key=lambda name: (-SPLITS.index(name.split("-")[0]), name))  # held-out ones first
    others = _marks_against(config, images / BEFORE, against)
    rows = [read_npy(marks_path(images / BEFORE / name).read_bytes()) for name in names]
    sizes = [len(each) for each in rows]
    marks = np.concatenate([others, *rows])
    digests, looks = marks[:, :32], marks[:, 32:].copy().view("<u8").ravel().astype(np.uint64)
    originals = copies(digests, looks, config.dedupe.near, config.workers, len(others))
    ends = np.cumsum([len(others), *sizes])
    kept = [originals[first:last] < 0 for first, last in zip(ends[:-1], ends[1:], strict=True)]
    jobs = [(images / BEFORE / name, images / name, mask) for name, mask in zip(names, kept, strict=True)]
    for _ in in_processes(write_kept, jobs, config.workers):
        pass
    thinned = Thinned({name: index_record(images / name) for name, mask in zip(names, kept, strict=True) if mask.any()})
    _account(thinned, images / BEFORE, names, ends, originals, digests)
    return thinned


def write_kept(source: Path, target: Path, kept: np.ndarray) -> None:
    """The samples of a shard that the mask (N,) keeps, as another shard; a link where it keeps them all."""
    shard = open_shard(source)
    if kept.all():
        for path, new in ((source, target), (source.with_suffix(".json"), target.with_suffix(".json"))):
            _link(path, new)
    else:
        write_shard(target, [shard.read(int(number)) for number in np.flatnonzero(kept)])


def mark_shard(shard: Shard, path: Path) -> None:
    """The marks of a finished shard's pictures as a file; ShardError if one cannot be decoded."""
    rows = []
    for number in range(len(shard)):
        files = shard.read(number).files
        try:
            rows.append(mark_of(next((files[ending] for ending in IMAGE_ENDINGS if ending in files), b"")))
        except ImageProblem as problem:
            raise ShardError(f"{shard.path}: sample {shard.keys[number]}: {problem}") from None
    write_bytes(path, marks_bytes(rows))


def _marks_against(config: PreprocessConfig, before: Path, against: list[Folder]) -> np.ndarray:
    """(N, MARK_BYTES) marks of all pictures of the folders; kept in files, so that a killed run need not redo them."""
    stem = f"against-{origin_of(against).get('against', '')[:12]}"
    shards = [shard for folder in against for split in SPLITS for shard in folder.shards(split)]
    paths = [before / f"{stem}-{number:06d}.marks.npy" for number in range(len(shards))]
    jobs = [(shard, path) for shard, path in zip(shards, paths, strict=True) if not path.is_file()]
    for _ in in_processes(mark_shard, jobs, config.workers):
        pass
    return np.concatenate([np.empty((0, MARK_BYTES), np.uint8), *(read_npy(path.read_bytes()) for path in paths)])


def _link(source: Path, target: Path) -> None:
    part = temporary(target)
    try:
        os.link(source, part)
    except OSError:  # not every file system has hard links
        shutil.copyfile(source, part)
    give_name(part, target)


def _account(
    thinned: Thinned, before: Path, names: list[str], ends: np.ndarray, originals: np.ndarray, digests: np.ndarray
) -> None:
    """Count what was taken out by kind, and name a few."""
    keys: dict[int, list[str]] = {}

    def key(row: int) -> str:
        shard = int(np.searchsorted(ends, row, "right")) - 1
        if shard < 0:
            return "a picture there"
        return keys.setdefault(shard, open_shard(before / names[shard]).keys)[row - int(ends[shard])]

    for row in np.flatnonzero(originals >= 0):
        original = int(originals[row])
        split, other = (
            names[shard].split("-")[0] if shard >= 0 else ""
            for shard in (int(np.searchsorted(ends, at, "right")) - 1 for at in (row, original))
        )
        of = "in the set to keep clear of" if not other else "held out" if split != other else "kept"
        near = "" if (digests[row] == digests[original]).all() else "near "
        reason = f"dropped: {near}copy of a picture {of}"
        thinned.lost[reason] += 1
        thinned.lost[f"kept: {split}"] -= 1
        named = thinned.examples.setdefault(reason, [])
        if len(named) < N_EXAMPLES:
            named.append(f"{key(int(row))} = {key(original)}")
