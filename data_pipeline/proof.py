"""Prove which samples a run has consumed, from its ledger and the indexes of its shards.

    smalti ledger runs/train                       # exit code 1 if the ledger differs from the order
    smalti ledger runs/train data=moved/tokens     # if the shards have moved
    smalti ledger runs/train json=true             # one JSON object, with every replaced and skipped sample

The order of samples is computed again from the seed and the shards, and each step's digest compared;
no sample is read. Works on any trainer's run folder, with or without the run going on.
"""

import json
import sys
import tomllib
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from cluster.command import Command, run_command, shown
from cluster.ledger import NAME, digest_of, read_ledger
from cluster.manifest import NAME as MANIFEST
from cluster.manifest import FolderError
from cluster.settings import SettingError, setting
from data_pipeline.folders import Shards, open_folders
from data_pipeline.foreign import open_images
from data_pipeline.mixture import Mixture, order_of
from data_pipeline.order import Order
from data_pipeline.remote import CacheConfig

KINDS = ("tokens", "images")  # settings of trainers that name shards, and what those hold
MOST_SHOWN = 20


@dataclass(frozen=True)
class LedgerConfig:
    """Whose ledger is proved."""

    run: str = setting("runs/train", "run folder (first plain word)")
    data: str = setting("", "folder of the shards, if they are not where the run's settings say")
    json: bool = setting(False, "print one JSON object")


@dataclass
class Finding:
    """What a ledger says, and where it is wrong."""

    steps: int = 0
    samples: int = 0
    epochs: list[float] = field(default_factory=list)  # of each folder if they are mixed by weight, else of all
    seen: dict[int, int] = field(default_factory=dict)  # times -> how many samples were trained on so often
    replaced: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)  # updates that were not applied
    skipped_keys: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)


def prove(config: LedgerConfig) -> None:
    """Print what the ledger says; see the module's text. FolderError if it does not fit the order."""
    run = Path(config.run)
    if not (run / NAME).is_file():
        raise FolderError(f"{run} has no {NAME}; name the folder of a run that keeps one")
    finding = examined(read_ledger(run), open_shards(run, config.data))
    if steps_done(run) not in (None, finding.steps):
        finding.wrong.append(f"it holds {finding.steps} steps, the run has done {steps_done(run)}")
    if config.json:
        print(json.dumps(asdict(finding) | {"proved": not finding.wrong}))
    else:
        print("\n".join(told(config.run, finding)))
    if finding.wrong:
        raise FolderError(f"{run / NAME} is not proved: {finding.wrong[0]}")


def open_shards(run: Path, data: str) -> Shards:
    """The indexes of the shards that a run trains on; the tars may be damaged since, or gone."""
    path = run / "settings.toml"
    try:
        settings = tomllib.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise FolderError(f"{path} cannot be read: {error}") from None
    kind = next((kind for kind in KINDS if kind in settings), None)
    if kind is None:
        raise FolderError(f"{path} names no {' or '.join(KINDS)}, so there is no order to compare with")
    try:
        if heldout := settings.get("heldout_images"):  # tars made by others
            return Shards(open_images(data or settings[kind], heldout, run / "indexes", CacheConfig()), kind, "train")
        return Shards(open_folders(data or settings[kind], kind, CacheConfig(), whole=False), kind, "train")
    except FolderError as error:
        raise FolderError(f"{error} (if the shards of {run} are elsewhere: data=FOLDER)") from None


def steps_done(run: Path) -> int | None:
    """How many steps a finished run says that it has done."""
    try:
        return int(json.loads((run / MANIFEST).read_text())["counts"]["steps"])
    except (OSError, ValueError, LookupError, TypeError):
        return None


def examined(lines: list[dict[str, Any] | None], shards: Shards) -> Finding:
    """Compare every line with the order that the shards give."""
    finding = Finding()
    times = np.zeros(len(shards), np.int64)
    first_samples = np.cumsum([0, *shards.sizes])
    order: Order | Mixture | None = None
    step, position = 0, 0
    for number, line in enumerate(lines, 1):
        if line is None:
            finding.wrong.append(f"line {number} cannot be read")
            continue
        if "order" in line:
            order = _order_of(line, shards, finding.wrong)
            continue
        if (line["step"], line["first"]) != (step, position):
            finding.wrong.append(
                f"step {line['step']} from position {line['first']} on follows where "
                f"step {step} from position {position} on should"
            )
        step, position = line["step"] + 1, line["first"] + line["count"]
        if order is None:
            finding.wrong.append(f"step {line['step']}: no line before it says in which order samples come")
            return finding
        places, keys = _consumed(line, order, shards, finding)
        if f"{digest_of(range(line['first'], position), places, keys):016x}" != line["digest"]:
            finding.wrong.append(f"step {line['step']}: its digest is not that of the samples at its positions")
        if "skipped" in line:
            finding.skipped.append(f"step {line['step']}: {line['skipped']}")
            finding.skipped_keys += [shards.name(place) for place in places]
        else:
            np.add.at(times, [first_samples[shard] + number for shard, number in places], 1)
        finding.steps += 1
        finding.samples += line["count"]
    finding.epochs = _epochs(order, position)
    finding.seen = {int(n): int(count) for n, count in sorted(Counter(times.tolist()).items())}
    return finding


def _order_of(line: dict[str, Any], shards: Shards, wrong: list[str]) -> Order | Mixture | None:
    about = line["order"]
    if about.get("shards") != shards.manifest.fingerprint:
        wrong.append(f"from step {line['step']} on it read other shards than these (fingerprint {about.get('shards')})")
    try:
        weights = [float(weight) for weight in about["weights"]]
        seed, window = int(about["seed"]), int(about["shuffle_window"])
        if seed < 0 or window < 1:
            raise ValueError(f"seed {seed}, window {window}")
        return order_of(shards.source_sizes, weights, seed, window)
    except (KeyError, TypeError, ValueError, SettingError) as error:
        wrong.append(f"the order from step {line['step']} on cannot be made: {error!r}")
        return None


def _consumed(
    line: dict[str, Any], order: Order | Mixture, shards: Shards, finding: Finding
) -> tuple[list[tuple[int, int]], list[str]]:
    """Places and keys of a step's samples, bad ones replaced; those are noted, and wrong if not drawn so."""
    places = {position: order[position] for position in range(line["first"], line["first"] + line["count"])}
    attempts: Counter[int] = Counter()
    for position, shard, number, key, reason in line.get("bad", ()):
        where = f"step {line['step']}, position {position}"
        if places.get(position) != (shard, number) or key != shown(shards.shards[shard].keys[number]):
            finding.wrong.append(
                f"{where}: sample {number} of shard {shard}, {key}, was replaced, but never drawn there"
            )
            continue
        attempts[position] += 1
        finding.replaced.append(f"{where}: {shards.name((shard, number))}: {reason}")
        places[position] = order.replacement(position, attempts[position])
    return list(places.values()), [shards.shards[shard].keys[number] for shard, number in places.values()]


def _epochs(order: Order | Mixture | None, position: int) -> list[float]:
    if isinstance(order, Mixture):
        drawn = Counter(order.source_at(at)[0] for at in range(position % order.period))
        whole = position // order.period
        return [
            (whole * share + drawn[n]) / o.total
            for n, (share, o) in enumerate(zip(order.shares, order.orders, strict=True))
        ]
    return [position / order.total] if order else []


def told(run: str, finding: Finding) -> Iterator[str]:
    """The finding in lines for people."""
    epochs = " and ".join(f"{n:.3g}" for n in finding.epochs)
    yield f"{run}: {finding.steps} steps consumed {finding.samples} samples, {epochs} epochs"
    for times, count in finding.seen.items():
        yield f"  trained on {times} times: {count} samples"
    for what, items in (
        ("replaced", finding.replaced),
        ("updates not applied", finding.skipped),
        ("samples of those updates", finding.skipped_keys),
        ("wrong", finding.wrong),
    ):
        if items:
            yield f"{what}: {len(items)}"
            yield from (f"  {item}" for item in items[:MOST_SHOWN])
        if len(items) > MOST_SHOWN:
            yield f"  and {len(items) - MOST_SHOWN} more: json=true shows all"
    if not finding.wrong:
        yield "proved: every step's digest is that of the samples that the order gives"


COMMAND = Command("ledger", LedgerConfig, Path(__file__).parent / "configs" / "ledger", prove, __doc__, plain=("run",))

if __name__ == "__main__":
    sys.exit(run_command(COMMAND, sys.argv[1:]))
