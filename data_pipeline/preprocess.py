"""Raw image-caption pairs -> `images/` shards, `vocab/` and a report of what was dropped and why.

    smalti preprocess emoji out=data

Reads what img2dataset writes (tars or files), any WebDataset tars, or a folder of pictures with a
.txt beside each. Writes OUT/images (shards of KEY.<picture>, KEY.txt, KEY.json), OUT/vocab (the BPE)
and OUT/report.json and report.html. Can be killed and run again: finished shards are kept. About
400 small pictures a second and core.
"""

import html
import itertools
import json
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

from cluster.command import Command, run_command
from cluster.manifest import FolderError, is_done, read_manifest, write_bytes, write_json, write_manifest
from cluster.metrics import Progress
from cluster.settings import SettingError, UserError, require_at_least_one, section, setting, to_dict
from data_pipeline.bpe import learn_vocabulary
from data_pipeline.captions import find_caption
from data_pipeline.images import IMAGE_ENDINGS, ImageProblem, decode, encode, shrink
from data_pipeline.remote import CacheConfig
from data_pipeline.shards import Sample, ShardError, open_shard, plain_key, write_shard
from data_pipeline.sources import Part, find_parts, fraction_of, read_part

SPLITS = ("train", "heldout")
Job = tuple[Part, Path, "PreprocessConfig"]


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
    cache: CacheConfig = section(CacheConfig)

    def __post_init__(self) -> None:
        if not 0 <= self.heldout_fraction < 1:
            raise SettingError(f"heldout_fraction={self.heldout_fraction} must be at least 0 and below 1")
        if self.vocab_size <= 256:
            raise SettingError(f"vocab_size={self.vocab_size} must be above 256 (the bytes alone are 256)")
        if not 1 <= self.image_quality <= 100:
            raise SettingError(f"image_quality={self.image_quality} must be from 1 to 100")
        require_at_least_one(self, ("image_side", "samples_per_shard", "workers", "max_pixels"))


def preprocess(config: PreprocessConfig) -> None:
    """Run the stage; see the module's text."""
    if not config.source:
        raise SettingError("source is empty: name a folder or tar of image-caption pairs, or use source=emoji:train")
    out, images = Path(config.out), Path(config.out) / "images"
    if is_done(images, "images", image_settings(config), {}):
        print(f"{images} is finished already")
    else:
        convert(config, out, images)
    learn(config, out, images)


def image_settings(config: PreprocessConfig) -> dict[str, Any]:
    """What decides the bytes of images/: not where it lies, how fast it is made, or the vocabulary."""
    return {
        key: value for key, value in to_dict(config).items() if key not in ("out", "workers", "vocab_size", "cache")
    }


def convert(config: PreprocessConfig, out: Path, images: Path) -> None:
    """Source -> images/ and the report."""
    images.mkdir(parents=True, exist_ok=True)
    _remember(images / "settings.json", image_settings(config))
    parts = find_parts(config.source, config.samples_per_shard, SPLITS[0], config.cache)
    if config.heldout_source:
        parts += find_parts(config.heldout_source, config.samples_per_shard, SPLITS[1], config.cache)
    fates = _convert_all(parts, images, config)
    shards = {split: sorted(images.glob(f"{split}-*.tar")) for split in SPLITS}
    if not shards["train"]:
        raise FolderError(f"{config.source} gave no usable image-caption pair: {dict(fates)}")
    write_report(out, fates)
    counts = {split: fates[f"kept: {split}"] for split in SPLITS}
    files = [path.name for split in SPLITS for path in shards[split]]
    write_manifest(images, "images", image_settings(config), counts, files, {})
    print(f"{counts['train']} training and {counts['heldout']} held-out pairs in {images}; report in {out}/report.html")


def learn(config: PreprocessConfig, out: Path, images: Path) -> None:
    """The training captions of images/ -> vocab/."""
    settings, vocab = {"vocab_size": config.vocab_size}, out / "vocab"
    manifest = read_manifest(images, "images")
    if is_done(vocab, "vocab", settings, {"images": manifest.fingerprint}):
        print(f"{vocab} is finished already")
        return
    shards = [open_shard(images / name) for name in manifest.files if name.startswith("train-")]
    captions = [shard.read_text(i) for shard in shards for i in range(len(shard))]
    learn_vocabulary(captions, config.vocab_size, vocab, settings, manifest.fingerprint)


def convert_part(part: Part, images: Path, config: PreprocessConfig) -> Counter[str]:
    """One part of the input -> its shards and `NAME.done.json`; returns the count of each fate.

    A pure function of the part and the settings, so parts may be done in any order or twice.
    """
    done = images / f"{part.split}-{part.number:06d}.done.json"
    if done.is_file():
        return Counter(json.loads(done.read_text()))
    fates: Counter[str] = Counter()
    kept: dict[str, list[Sample]] = {split: [] for split in SPLITS}
    seen: set[str] = set()
    for sample in _survivors(part, fates):
        converted = _convert(sample, config, fates, seen)
        if converted is not None:
            held = part.split == "train" and not config.heldout_source
            is_heldout = part.split == "heldout" or (held and fraction_of(converted.key) < config.heldout_fraction)
            kept[SPLITS[is_heldout]].append(converted)
    for split, samples in kept.items():
        shard = write_shard(images / f"{split}-{part.number:06d}.tar", samples)
        if shard is not None:
            fates[f"kept: {split}"] += len(shard)
    write_json(done, dict(sorted(fates.items())))
    return fates


def _survivors(part: Part, fates: Counter[str]) -> Iterator[Sample]:
    """Samples of a part up to the first damage, which is named and counted."""
    try:
        yield from read_part(part)
    except ShardError as error:
        fates["damaged or empty tar"] += 1
        print(f"smalti preprocess: {error}; going on without the rest of it", file=sys.stderr)


def _convert(sample: Sample, config: PreprocessConfig, fates: Counter[str], seen: set[str]) -> Sample | None:
    """The sample as it is stored, or None with the reason counted."""
    fates["read"] += 1
    caption = find_caption(sample.files, config.caption_field)
    picture = next((sample.files[e] for e in IMAGE_ENDINGS if e in sample.files), None)
    key = plain_key(sample.key)
    reason = "no picture" if picture is None else "no caption" if not caption else ""
    if key in seen:
        reason = "key used twice"
    if reason or picture is None:
        fates[f"dropped: {reason}"] += 1
        return None
    try:
        image = shrink(decode(picture, config.max_pixels), config.image_side)
        stored = encode(image, config.image_format, config.image_quality)
    except ImageProblem as problem:
        fates[f"dropped: {problem}"] += 1
        return None
    seen.add(key)
    files = {config.image_format: stored, "txt": caption.encode()}
    return Sample(key, files | ({"json": sample.files["json"]} if "json" in sample.files else {}))


def _convert_all(parts: list[Part], images: Path, config: PreprocessConfig) -> Counter[str]:
    jobs = [(part, images, config) for part in parts]
    progress = Progress("preprocess", len(parts), unit="shard")
    fates: Counter[str] = Counter()
    for result in _in_processes(jobs, config.workers) if config.workers > 1 else itertools.starmap(convert_part, jobs):
        fates += result
        progress.advance(note=f"{fates['kept: train'] + fates['kept: heldout']} pairs kept")
    progress.close()
    return fates


def _in_processes(jobs: list[Job], workers: int) -> Iterator[Counter[str]]:
    pool = ProcessPoolExecutor(min(workers, len(jobs)), get_context("spawn"))
    try:
        for done in as_completed([pool.submit(convert_part, *job) for job in jobs]):
            yield done.result()
    except BrokenProcessPool:
        raise UserError(
            "a worker was killed (out of memory?); run the same command again, with fewer workers"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def write_report(out: Path, fates: Counter[str]) -> None:
    """report.json and report.html: how many samples met each fate."""
    write_json(out / "report.json", dict(sorted(fates.items())))
    rows = "".join(f"<tr><td>{html.escape(name)}<td align=right>{n:,}" for name, n in sorted(fates.items()))
    page = (
        "<!doctype html><meta charset=utf-8><title>smalti preprocess</title>"
        "<style>body{font:16px sans-serif;margin:3em}td{padding:.2em 1em;border-bottom:1px solid #ddd}</style>"
        f"<h1>What became of every sample</h1><table>{rows}</table>"
    )
    write_bytes(out / "report.html", page.encode())


def _remember(path: Path, settings: dict) -> None:
    """Keep the settings of an unfinished folder, and refuse to finish it with others."""
    text = json.dumps(settings)
    if path.is_file() and path.read_text().strip() != text:
        raise FolderError(f"{path.parent} was begun with other settings; use another `out` or remove {path.parent}")
    write_bytes(path, text.encode())


COMMAND = Command("preprocess", PreprocessConfig, Path(__file__).parent / "configs", preprocess, __doc__)

if __name__ == "__main__":
    sys.exit(run_command(COMMAND, sys.argv[1:]))
