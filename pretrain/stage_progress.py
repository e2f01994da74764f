"""What a stage's folder tells of how far it is, whatever state it is in: nothing here fails on a damaged folder."""

import json
import time
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from cluster.checkpoint import SEAL, found_in, verify
from cluster.manifest import NAME as MANIFEST
from cluster.manifest import VERB_OF, Manifest, file_digest, read_manifest
from cluster.records import read_records
from cluster.run import STARTS
from cluster.settings import UserError, from_dict
from data_pipeline.convert import PreprocessConfig, all_parts, name_of, read_record, shard_folder
from data_pipeline.folders import shard_names

RUNS = ("settings.toml", STARTS, "metrics.jsonl", "checkpoints")  # any of them: a trainer's folder
PARTS, BEGUN = "parts.json", "begun.json"  # of an unfinished folder of images, of tokens
RECENT = 50  # steps whose mean says how long the rest takes
STEP, STALL = "perf/step_seconds", "perf/save_stall_seconds"


@dataclass
class Progress:
    """How far a stage is; None and "": not known, or there is none."""

    kind: str = ""
    state: str = ""  # finished, unfinished, damaged
    done: int | None = None
    total: int | None = None
    unit: str = ""
    starts: int = 0
    seconds_left: float | None = None  # if it runs, at the rate it had
    goodput: float | None = None
    checkpoint_step: int | None = None
    checkpoint_age_seconds: float | None = None
    silent_seconds: float | None = None  # since the last sign of life
    missing: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def is_stage(folder: Path) -> bool:
    """True if a stage has begun to write there."""
    return any((folder / name).exists() for name in (MANIFEST, PARTS, BEGUN, *RUNS)) or _pictures(folder) > 0


def progress_of(folder: Path, digests: bool, others: list[Path]) -> Progress:
    """How far the stage of a folder is. digests: whole files are read; others: folders it may have been made from."""
    if (folder / MANIFEST).exists():
        return _finished(folder, digests)
    if any((folder / name).exists() for name in RUNS):
        return _run(folder, digests)
    if (folder / PARTS).exists():
        return _images(folder)
    if (folder / BEGUN).exists():
        return _tokens(folder, [folder.parent / "images", *others])
    newest = max((path.stat().st_mtime for path in folder.glob("*/*.png")), default=None)
    return Progress("samples", "unfinished", _pictures(folder), None, "pictures", silent_seconds=_ago(newest))


def _finished(folder: Path, digests: bool) -> Progress:
    try:
        manifest = read_manifest(folder, _kind(folder))
    except (UserError, OSError) as error:
        return Progress(state="damaged", problems=[str(error)])
    one = _run(folder, digests) if any((folder / name).exists() for name in RUNS) else Progress(unit="files")
    one.kind, one.seconds_left, one.silent_seconds = manifest.kind, None, None
    one.missing = _damaged(folder, manifest, digests)
    one.state = "damaged" if one.missing else "finished"
    if one.unit == "files":
        one.done, one.total = len(manifest.files) - len(one.missing), len(manifest.files)
    return one


def _kind(folder: Path) -> str:
    """What a manifest says it is; one that cannot be read is called by what can be made again."""
    try:
        kind = json.loads((folder / MANIFEST).read_text())["kind"]
    except (ValueError, KeyError, TypeError):
        kind = ""
    return kind if kind in VERB_OF else "images"


def _damaged(folder: Path, manifest: Manifest, digests: bool) -> list[str]:
    """Names of files that are not as the manifest says."""
    found = []
    for name, record in manifest.files.items():
        path = folder / name
        whole = path.is_file() and path.stat().st_size == record["bytes"]
        if not whole or (digests and file_digest(path) != record["sha256"]):
            found.append(name)
    return found


def _run(folder: Path, digests: bool) -> Progress:
    one = Progress(state="unfinished", unit="steps")
    try:
        settings = tomllib.loads((folder / "settings.toml").read_text())
        one.total = int(settings["n_steps"])
        one.kind = "transformer" if "tokens" in settings else "dvae" if "heldout_images" in settings else "scorer"
    except (OSError, ValueError, KeyError, TypeError) as error:
        one.problems.append(f"settings.toml cannot be read ({error}); the next start writes it anew")
    _add_checkpoint(one, folder, digests)
    steps = [record for record in _records(folder / "metrics.jsonl") if STEP in record and "step" in record]
    one.done = steps[-1]["step"] + 1 if steps else one.checkpoint_step or 0
    if steps and one.total is not None:
        one.seconds_left = fmean(record[STEP] for record in steps[-RECENT:]) * max(0, one.total - one.done)
    signs = [folder / name for name in (MANIFEST, "metrics.jsonl", STARTS, "settings.toml", "checkpoints/latest")]
    alive = max((path.stat().st_mtime for path in signs if path.is_file()), default=None)
    one.silent_seconds = _ago(alive)
    starts = [record for record in _records(folder / STARTS) if {"time", "step"} <= record.keys()]
    one.starts = len(starts)
    if starts and steps and alive is not None:
        # a later start drops the records of steps that it does again, so what is left is what counts
        useful = sum(r[STEP] - r.get(STALL, 0.0) for r in steps if r["step"] >= starts[0]["step"])
        one.goodput = min(1.0, useful / max(alive - starts[0]["time"], useful, 1e-9))
    return one


def _add_checkpoint(one: Progress, folder: Path, digests: bool) -> None:
    """The newest checkpoint that verifies, and what is wrong with newer ones."""
    for step, path in reversed(found_in(folder / "checkpoints")):
        # a share that no file has: names, sizes and the seal are compared, but no digest
        problem = verify(path) if digests else verify(path, share=1, n_shares=1)
        if problem is None:
            one.checkpoint_step, one.checkpoint_age_seconds = step, _ago((path / SEAL).stat().st_mtime)
            return
        one.problems.append(f"checkpoint {path.name}: {problem}")


def _images(folder: Path) -> Progress:
    one = Progress("images", "unfinished", unit="shards")
    try:
        settings = json.loads((folder / "settings.json").read_text())
        config = from_dict(PreprocessConfig, settings | {"out": str(folder.parent)})
        parts, where = all_parts(config), shard_folder(config)
    except (UserError, OSError, ValueError, TypeError) as error:
        one.problems.append(f"what is to be done cannot be told: {error}")
        return _add_rate(one, list(folder.glob("**/*.done.json")))
    one.total = len(parts)
    one.missing = [name_of(part) for part in parts if read_record(part, where) is None]
    made = [where / f"{name_of(part)}.done.json" for part in parts if name_of(part) not in one.missing]
    if not one.missing:
        one.problems.append("all shards are made, their manifest is not: run `smalti preprocess merge`")
    return _add_rate(one, made)


def _tokens(folder: Path, others: list[Path]) -> Progress:
    one = Progress("tokens", "unfinished", unit="shards")
    made = [path for path in folder.glob("*.done.json") if _is_made(path)]
    try:
        origin = json.loads((folder / BEGUN).read_text())["images"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        one.problems.append(f"{BEGUN} cannot be read: {error}")
        return _add_rate(one, made)
    names = next((names for other in others if (names := _names_of(other, origin))), None)
    if names is None:
        one.problems.append("the images it is made from were not found beside it, so their number is not known")
        return _add_rate(one, made)
    there = {path.name.removesuffix(".done.json") for path in made}
    one.total, one.missing = len(names), [name for name in names if Path(name).stem not in there]
    if not one.missing:
        one.problems.append("all shards are made, their manifest is not: run `smalti tokenise merge`")
    return _add_rate(one, made)


def _names_of(images: Path, fingerprint: str) -> list[str] | None:
    """Names of the shards of an image folder, if it is the one with this fingerprint."""
    try:
        manifest = read_manifest(images, "images")
    except (UserError, OSError):
        return None
    names = [name for split in ("train", "heldout") for name in shard_names(manifest, split)]
    return names if manifest.fingerprint == fingerprint else None


def _is_made(record: Path) -> bool:
    """True if a token shard's record can be read and its tar has the size it tells."""
    try:
        values = json.loads(record.read_text())
        tar = record.with_name(record.name.replace(".done.json", ".tar"))
        return not values["count"] or tar.stat().st_size == values["bytes"]
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _add_rate(one: Progress, records: list[Path]) -> Progress:
    """Count shards by their records, and guess from the times of these how long the others take."""
    times = sorted(path.stat().st_mtime for path in records if path.is_file())
    one.done = len(times)
    one.silent_seconds = _ago(times[-1]) if times else None
    if one.total is not None and len(times) > 1:
        one.seconds_left = (one.total - one.done) * (times[-1] - times[0]) / (len(times) - 1)
    return one


def _pictures(folder: Path) -> int:
    return sum(1 for _ in folder.glob("[0-9][0-9][0-9][0-9]*/[0-9][0-9]*.png"))


def _records(path: Path) -> list[dict[str, Any]]:
    try:
        return read_records(path)
    except OSError:
        return []


def _ago(when: float | None) -> float | None:
    return None if when is None else max(0.0, time.time() - when)
