"""Ends what tasks of `smalti preprocess` began: copies are taken out, then manifest, report and vocabulary.

    smalti preprocess merge emoji out=data tasks=8

Takes the same words as the tasks. Refuses while a part of the input is not converted, and names it.
Converts nothing itself; may be killed and run again.
"""

import html
import itertools
import json
import shutil
import sys
from collections import Counter
from pathlib import Path

from cluster.command import Command, run_command, shown
from cluster.manifest import FolderError, is_done, read_manifest, sweep, write_bytes, write_json, write_manifest
from cluster.settings import SettingError
from data_pipeline.bpe import learn_vocabulary
from data_pipeline.convert import (
    BEFORE,
    SPLITS,
    UNJUDGED,
    PreprocessConfig,
    Record,
    all_parts,
    digest_of_parts,
    image_settings,
    name_of,
    read_record,
    shard_folder,
    takes_out_copies,
)
from data_pipeline.filters import parse_thresholds
from data_pipeline.folders import Folder
from data_pipeline.shards import open_shard
from data_pipeline.shares import refuse_gaps
from data_pipeline.thinning import folders_against, origin_of, thin

N_EXAMPLES = 5  # dropped samples that the report names for each reason


def merge(config: PreprocessConfig) -> None:
    """Finish images/, the report and vocab/; FolderError while something is missing."""
    out, images = Path(config.out), Path(config.out) / "images"
    against = start(config)
    if is_done(images, "images", image_settings(config), origin_of(against)):
        print(f"{images} is finished already")
    else:
        finish(config, out, images, against)
    shutil.rmtree(images / BEFORE, ignore_errors=True)
    learn(config, out, images)


def start(config: PreprocessConfig) -> list[Folder]:
    """Refuse settings that cannot work; returns the folders that this set must share no picture with."""
    if not config.source:
        raise SettingError("source is empty: name a folder or tar of image-caption pairs, or use source=emoji:train")
    return folders_against(config)


def finish(config: PreprocessConfig, out: Path, images: Path, against: list[Folder]) -> None:
    """Converted parts -> images/ without copies, its manifest and the report."""
    parts = all_parts(config)
    if images.is_dir():
        remember(images / "settings.json", image_settings(config), "other settings")
        remember(
            images / "parts.json", {"parts": len(parts), "sha256": digest_of_parts(parts)}, "a source of other files"
        )
    folder = shard_folder(config)
    records = [read_record(part, folder) for part in parts]
    missing = {n: name_of(part) for n, (part, record) in enumerate(zip(parts, records, strict=True)) if record is None}
    refuse_gaps(missing, len(parts), "preprocess", config.tasks)
    fates, examples, files = collected([record for record in records if record])
    tell_unjudged(config, fates)
    if takes_out_copies(config):
        thinned = thin(config, list(files), against)
        files = thinned.files
        fates.update(thinned.lost)
        examples |= thinned.examples
    counts = {split: fates[f"kept: {split}"] for split in SPLITS}
    if not counts["train"]:
        raise FolderError(f"{config.source} gave no usable image-caption pair: {dict(fates)}")
    write_report(out, fates, examples)
    sweep(images)
    write_manifest(images, "images", image_settings(config), counts, files, origin_of(against))
    print(f"{counts['train']} training and {counts['heldout']} held-out pairs in {images}; report in {out}/report.html")


def collected(records: list[Record]) -> tuple[Counter[str], dict[str, list[str]], dict]:
    """Fates, examples and files of all parts; training shards first, as their names are sorted."""
    fates: Counter[str] = Counter()
    examples: dict[str, list[str]] = {}
    for record in records:
        fates.update(record.fates)
        for reason, keys in record.examples.items():
            named = examples.setdefault(reason, [])
            named += keys[: N_EXAMPLES - len(named)]
    files = {name: file for record in records for name, file in record.files.items()}
    return fates, examples, {name: files[name] for name in sorted(files, key=by_split)}


def tell_unjudged(config: PreprocessConfig, fates: Counter[str]) -> None:
    """Say which thresholds judged no pair that passed: their field is mistyped, or not in this input."""
    passed = sum(fates[f"kept: {split}"] for split in SPLITS)
    fields = dict.fromkeys(shown(rule.field) for rule in parse_thresholds(config.filters.thresholds))
    for name in fields if passed else ():
        if fates[UNJUDGED.format(name)] == passed:
            print(
                f"smalti preprocess: filters.thresholds: none of the {passed} pairs that passed has a number named "
                f"{name} in its KEY.json, so none was judged by it; is the name right?",
                file=sys.stderr,
            )


def by_split(name: str) -> tuple[int, str]:
    return SPLITS.index(name.split("-")[0]), name


def learn(config: PreprocessConfig, out: Path, images: Path) -> None:
    """The training captions of images/ -> vocab/."""
    settings, vocab = {"vocab_size": config.vocab_size}, out / "vocab"
    manifest = read_manifest(images, "images")
    if is_done(vocab, "vocab", settings, {"images": manifest.fingerprint}):
        print(f"{vocab} is finished already")
        return
    shards = (open_shard(images / name) for name in manifest.files if name.startswith("train-"))
    captions = list(itertools.chain.from_iterable(map(shard.read_text, range(len(shard))) for shard in shards))
    learn_vocabulary(captions, config.vocab_size, vocab, settings, manifest.fingerprint)


def write_report(out: Path, fates: Counter[str], examples: dict[str, list[str]]) -> None:
    """report.json: how many samples met each fate; report.html: the same with the keys of a few."""
    fates = Counter({name: count for name, count in sorted(fates.items()) if count})
    write_json(out / "report.json", dict(fates))
    rows = "".join(
        f"<tr><td>{html.escape(name)}<td align=right>{n:,}<td>{html.escape(', '.join(examples.get(name, [])))}"
        for name, n in fates.items()
    )
    page = (
        "<!doctype html><meta charset=utf-8><title>smalti preprocess</title>"
        "<style>body{font:16px sans-serif;margin:3em}td{padding:.2em 1em;border-bottom:1px solid #ddd}</style>"
        f"<h1>What became of every sample</h1><table>{rows}</table>"
    )
    write_bytes(out / "report.html", page.encode())


def remember(path: Path, values: dict, other: str) -> None:
    """Keep what an unfinished folder was begun with, and refuse to finish it with something else."""
    text = json.dumps(values)
    if path.is_file() and path.read_text().strip() != text:
        raise FolderError(f"{path.parent} was begun with {other}; use another `out` or remove {path.parent}")
    write_bytes(path, text.encode())


COMMAND = Command("preprocess merge", PreprocessConfig, Path(__file__).parent / "configs", merge, __doc__)

if __name__ == "__main__":
    sys.exit(run_command(COMMAND, sys.argv[1:]))
