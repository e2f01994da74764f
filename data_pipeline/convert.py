"""One part of the raw input -> its shards, and a record of what became of every pair in it.

The parts are the work that tasks, ranks and workers share. A part is done when its record,
NAME.done.json, is there: it is written last, so a part may be done twice, or by two at once.
"""

import json
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

import numpy as np

from cluster.command import shown
from cluster.manifest import file_digest, write_bytes, write_json
from cluster.process import Place
from cluster.settings import SettingError, require_at_least_one, section, setting, to_dict
from data_pipeline.captions import find_caption
from data_pipeline.contents import npy_bytes
from data_pipeline.dedupe import DedupeConfig, marks
from data_pipeline.filters import FilterConfig, Filters
from data_pipeline.images import IMAGE_ENDINGS, ImageProblem, decode, encode, shrink
from data_pipeline.remote import CacheConfig
from data_pipeline.shards import Sample, ShardError, index_record, plain_key, write_shard
from data_pipeline.shares import check_share, share_of
from data_pipeline.sources import Part, find_parts, fraction_of, read_part

SPLITS = ("train", "heldout")
BEFORE = "before"  # folder in images/ of the shards that copies have still to be taken out of
N_EXAMPLES = 3  # dropped samples of a part that its record names, for each reason
UNJUDGED = "passed though {} is missing"  # the fate of samples that a threshold could not judge
MARK_BYTES = 40  # of a picture: 32 bytes of sha256, 8 of perceptual hash


@dataclass(frozen=True)
class PreprocessConfig:
    """What is read, what is kept, and how it is stored."""

    source: str = setting("", "folder, tar or tars{00..07}.tar of pairs; 'emoji:train' is the embedded set")
    heldout_source: str = setting("", "pairs held out from training; empty: heldout_fraction of source")
    heldout_fraction: float = setting(0.01, "share of source held out, by a hash of the key")
    out: str = setting("data", "folder to write")
    image_side: int = setting(256, "the shorter side is reduced to at most this many pixels")
    image_format: Literal["webp", "jpg", "png"] = setting("webp", "how pictures are stored; png is lossless")
    image_quality: int = setting(90, "webp and jpg quality, 1 to 100")
    max_pixels: int = setting(100_000_000, "larger pictures are dropped before they are decoded")
    caption_field: str = setting("caption", "field of KEY.json that holds the caption where no .txt does")
    samples_per_shard: int = setting(10_000, "for a folder of loose files; a tar gives one shard")
    vocab_size: int = setting(16_384, "entries of the BPE, 256 of them bytes (the paper: 16384)")
    workers: int = setting(1, "processes; the result does not depend on it")
    tasks: int = setting(0, "so many tasks share the work, each with its task=; `smalti preprocess merge` ends it")
    task: int = setting(-1, "number of this task, from 0; it does its share and no more")
    filters: FilterConfig = section(FilterConfig)
    dedupe: DedupeConfig = section(DedupeConfig)
    cache: CacheConfig = section(CacheConfig)

    def __post_init__(self) -> None:
        if not 0 <= self.heldout_fraction < 1:
            raise SettingError(f"heldout_fraction={self.heldout_fraction} must be at least 0 and below 1")
        if self.vocab_size <= 256:
            raise SettingError(f"vocab_size={self.vocab_size} must be above 256 (the bytes alone are 256)")
        if not 1 <= self.image_quality <= 100:
            raise SettingError(f"image_quality={self.image_quality} must be from 1 to 100")
        require_at_least_one(self, ("image_side", "samples_per_shard", "workers", "max_pixels"))
        check_share(self.tasks, self.task)

    def share(self, parts: list[Part], place: Place) -> list[Part]:
        """Those of all parts that are this process's to convert; SettingError if it is not said which."""
        return share_of(parts, self.tasks, self.task, place)


def image_settings(config: PreprocessConfig) -> dict[str, Any]:
    """What decides the bytes of images/: not where it lies, how fast it is made, or the vocabulary.

    Sections that are as they come are left out: folders made before they existed stay valid. A blocklist counts by
    what is in it. SettingError if one cannot be read.
    """
    left_out = {"out", "workers", "tasks", "task", "vocab_size", "cache"}
    left_out |= {name for name, kind in (("filters", FilterConfig), ("dedupe", DedupeConfig))
                 if getattr(config, name) == kind()}  # fmt: skip
    settings = {key: value for key, value in to_dict(config).items() if key not in left_out}
    if "filters" in settings:
        try:
            settings["filters"]["blocklist"] = [file_digest(Path(name)) for name in config.filters.blocklist]
        except OSError as error:
            raise SettingError(f"filters.blocklist: {error.filename} cannot be read: {error.strerror}") from None
    return settings


def all_parts(config: PreprocessConfig) -> list[Part]:
    """Every part of the input, those for training first: a part's number in this list decides who does it."""
    parts = find_parts(config.source, config.samples_per_shard, SPLITS[0], config.cache)
    if config.heldout_source:
        parts += find_parts(config.heldout_source, config.samples_per_shard, SPLITS[1], config.cache)
    return parts


def digest_of_parts(parts: list[Part]) -> str:
    """What must not change while the work is under way: which files the input consists of."""
    names = [[str(path) for path in part.paths] + [part.remote.url if part.remote else ""] for part in parts]
    return sha256(json.dumps(names).encode("utf-8", "surrogateescape")).hexdigest()


def takes_out_copies(config: PreprocessConfig) -> bool:
    return config.dedupe.exact or config.dedupe.near >= 0


def shard_folder(config: PreprocessConfig) -> Path:
    """Where tasks write their shards: images/, or the folder in it that merging makes images/ from."""
    images = Path(config.out) / "images"
    return images / BEFORE if takes_out_copies(config) else images


@dataclass(frozen=True)
class Record:
    """What became of a part: samples by fate, some dropped keys by reason, and the tars with bytes and sha256."""

    fates: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)
    files: dict[str, dict[str, Any]] = field(default_factory=dict)

    def drop(self, key: str, reason: str) -> None:
        self.fates[f"dropped: {reason}"] += 1
        named = self.examples.setdefault(f"dropped: {reason}", [])
        if len(named) < N_EXAMPLES:
            named.append(key)


class Dropped(Exception):
    """Why a pair is not kept: a short reason to count."""


def name_of(part: Part) -> str:
    return f"{part.split}-{part.number:06d}"


def marks_path(shard: Path) -> Path:
    return shard.with_suffix(".marks.npy")


def read_record(part: Part, folder: Path) -> Record | None:
    """The record of a part that is done.

    None if it is not, if one of its tars is gone or of another size, or if the input has other sizes than it had then:
    a tar that was cut is fetched again.
    """
    try:
        values = json.loads((folder / f"{name_of(part)}.done.json").read_text())
        now = source_bytes(part)
        if values.get("source_bytes", now) != now:  # older records do not tell
            return None
        record = Record(Counter(values["fates"]), values["examples"], values["files"])
        for name, file in record.files.items():
            if (folder / name).stat().st_size != file["bytes"] or not (folder / name).with_suffix(".json").is_file():
                return None
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return record


def source_bytes(part: Part) -> int | None:
    """Bytes of a part's tar or pictures; None for a tar elsewhere of which they are not known."""
    return part.remote.n_bytes if part.remote else sum(path.stat().st_size for path in part.paths)


def convert_part(part: Part, config: PreprocessConfig) -> Counter[str]:
    """Write a part's shards and its record, if it is not done; returns the count of each fate.

    A pure function of the part and the settings, so parts may be done in any order or twice.
    """
    folder = shard_folder(config)
    done = read_record(part, folder)
    if done is not None:
        return done.fates
    record, n_bytes = Record(), source_bytes(part)
    kept: dict[str, list[Sample]] = {split: [] for split in SPLITS}
    marked: dict[str, list[bytes]] = {split: [] for split in SPLITS}
    seen: set[str] = set()
    for sample in _survivors(part, record):
        record.fates["read"] += 1
        try:
            stored, mark = _convert(sample, config, seen)
        except Dropped as dropped:
            record.drop(plain_key(sample.key), str(dropped))
            continue
        seen.add(stored.key)
        if config.filters.thresholds:
            unjudged = filters_of(config.filters).unjudged(_about(sample))
            record.fates.update(UNJUDGED.format(shown(name)) for name in unjudged)
        held = part.split == "train" and not config.heldout_source
        split = SPLITS[part.split == "heldout" or (held and fraction_of(stored.key) < config.heldout_fraction)]
        kept[split].append(stored)
        marked[split].append(mark)
    for split, samples in kept.items():
        path = folder / f"{split}-{part.number:06d}.tar"
        shard = write_shard(path, samples)
        if shard is not None:
            record.fates[f"kept: {split}"] += len(shard)
            record.files[path.name] = index_record(path)
            if takes_out_copies(config):
                write_bytes(marks_path(path), marks_bytes(marked[split]))
    values = {"fates": dict(sorted(record.fates.items())), "examples": dict(sorted(record.examples.items()))}
    values |= {"files": record.files, "source_bytes": n_bytes}
    write_json(folder / f"{name_of(part)}.done.json", values)
    return record.fates


def marks_bytes(rows: list[bytes]) -> bytes:
    """Marks of the samples of a shard, as the .npy of (N, MARK_BYTES) uint8."""
    return npy_bytes(np.frombuffer(b"".join(rows), np.uint8).reshape(len(rows), MARK_BYTES))


def mark_of(data: bytes) -> bytes:
    """The mark of a picture as it is stored; ImageProblem if it cannot be decoded."""
    digest, look = marks(decode(data, sys.maxsize))
    return digest + look.to_bytes(8, "little")


def _survivors(part: Part, record: Record) -> Iterator[Sample]:
    """Samples of a part up to the first damage, which is named and counted."""
    try:
        yield from read_part(part)
    except ShardError as error:
        record.fates["damaged or empty tar"] += 1
        print(f"smalti preprocess: {error}; going on without the rest of it", file=sys.stderr)


def _convert(sample: Sample, config: PreprocessConfig, seen: set[str]) -> tuple[Sample, bytes]:
    """The sample as it is stored, and its mark where copies are looked for; raises Dropped."""
    caption = find_caption(sample.files, config.caption_field)
    picture = next((sample.files[e] for e in IMAGE_ENDINGS if e in sample.files), None)
    key = plain_key(sample.key)
    if key in seen:
        raise Dropped("key used twice")
    if picture is None:
        raise Dropped("no picture")
    if not caption:
        raise Dropped("no caption")
    filters = None if config.filters == FilterConfig() else filters_of(config.filters)
    if filters:
        _refuse(filters.of_caption(caption, _about(sample)) or filters.of_bytes(picture))
    try:
        image = decode(picture, config.max_pixels)
        if filters:
            _refuse(filters.of_size(*image.size))
        stored = encode(shrink(image, config.image_side), config.image_format, config.image_quality)
        mark = mark_of(stored) if takes_out_copies(config) else b""
    except ImageProblem as problem:
        raise Dropped(str(problem)) from None
    files = {config.image_format: stored, "txt": caption.encode()}
    return Sample(key, files | ({"json": sample.files["json"]} if "json" in sample.files else {})), mark


@lru_cache(maxsize=1)
def filters_of(config: FilterConfig) -> Filters:
    """The rules, whose lists and language models are read once a process."""
    return Filters(config)


def _refuse(reason: str | None) -> None:
    if reason:
        raise Dropped(reason)


def _about(sample: Sample) -> dict[str, Any]:
    """The fields of KEY.json; none if it is missing or damaged."""
    try:
        about = json.loads(sample.files.get("json", b"{}"))
    except (ValueError, RecursionError):
        return {}
    return about if isinstance(about, dict) else {}
