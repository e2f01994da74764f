"""What a save costs training: `python -m benchmarks.checkpoint [--json]`; about a minute on two cores.

One process trains a transformer of 64 million parameters in float32 on the CPU and saves what its run would: weights
and both moments, 0.8 GB. Steps without a save take turns with steps of which every SAVE_EVERY-th saves, in the
background and not, so that all meet the machine in the same state. The stall is how long training stood still at
the save; the share is of the time between two saves, and counts what the writing slows the steps besides, which
share the two cores with it here.
"""

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from cluster.checkpoint import Checkpoints, verify
from cluster.process import lone_place
from pretrain.config import TransformerConfig
from pretrain.model import Sizes
from pretrain.update import Update

MODEL = TransformerConfig(n_text=32, n_layers=12, n_heads=10, d_head=64)
SIZES = Sizes(text_vocab=4096, codebook=2048, grid=8)
BATCH, SAVE_EVERY, ROUNDS = 2, 12, 2
MOST_SHARE = 0.05  # of the time between two saves
MODES = ("none", "background", "waiting")


@dataclass(frozen=True)
class Row:
    """One number; `ok` if it keeps the bar, which 0 says there is none of."""

    what: str
    value: float
    bar: float
    ok: bool


class Training:
    """Steps of a model, and saves of it."""

    def __init__(self, folder: Path) -> None:
        place = lone_place()
        self.update = Update(MODEL, SIZES, BATCH, place.device, torch.float32)
        self.checkpoints = Checkpoints(folder, place, keep_last=1)
        self.step, self.stalls = 0, dict[str, list[float]]((mode, []) for mode in MODES)

    def round(self, mode: str) -> float:
        """Seconds for SAVE_EVERY steps and what follows them in that mode, all writing of the round included."""
        start = time.perf_counter()
        for number in range(SAVE_EVERY):
            self.update()
            self.step += 1
            if number == 0 and mode != "none":
                self.checkpoints.save(self.step, {}, self._write, background=mode == "background")
                self.stalls[mode].append(self.checkpoints.stall_seconds)
        self.checkpoints.wait()
        return time.perf_counter() - start

    def _write(self, folder: Path, tag: str) -> None:
        state = {"model": self.update.model.state_dict(), "optimizer": self.update.optimizer.state_dict()}
        self.checkpoints.writer.save(state, str(folder / tag / "state.pt"))


def measure(folder: Path) -> list[Row]:
    """All rows; the folder needs 2 GB."""
    training = Training(folder)
    training.round("background")  # memory is touched for the first time
    first = training.stalls["background"].pop()
    rounds = [{mode: training.round(mode) for mode in MODES} for _ in range(ROUNDS)]
    seconds = {mode: statistics.median(one[mode] for one in rounds) for mode in MODES}
    kept = next(folder.glob("global_step*"))
    size = sum(path.stat().st_size for path in kept.iterdir())
    rows = [
        Row("parameters, millions", sum(p.numel() for p in training.update.model.parameters()) / 1e6, 0, True),
        Row("checkpoint, MB", size / 1e6, 0, verify(kept) is None),
        Row("step, ms", seconds["none"] / SAVE_EVERY * 1e3, 0, True),
        Row("steps between saves", SAVE_EVERY, 0, True),
        Row("background: first stall, ms", first * 1e3, 0, True),
        Row("memory of the snapshot, MB", training.checkpoints.writer.memory.n_bytes / 1e6, 0, True),
    ]
    for mode in ("background", "waiting"):
        stall = statistics.median(training.stalls[mode])
        is_ours = mode == "background"
        rows += [
            Row(f"{mode}: stall, ms", stall * 1e3, 0, True),
            _share(f"{mode}: stall, share of the time between saves", stall / seconds["none"], is_ours),
            _share(f"{mode}: all that saving adds, share", seconds[mode] / seconds["none"] - 1, False),
        ]
    return rows


def _share(what: str, value: float, has_bar: bool) -> Row:
    return Row(what, value, MOST_SHARE if has_bar else 0, value <= MOST_SHARE or not has_bar)


def main() -> int:
    """Print the rows; 1 if one misses its bar."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON line a row")
    parser.add_argument("--folder", default=None, help="disk to save to (default: a temporary folder)")
    words = parser.parse_args()
    folder = Path(tempfile.mkdtemp(dir=words.folder))
    try:
        rows = measure(folder / "checkpoints")
    finally:
        shutil.rmtree(folder)
    for row in rows:
        bar = f"  (at most {row.bar:g})" if row.bar else ""
        print(json.dumps(asdict(row)) if words.json else f"{row.what:<55}{row.value:>12.4g}{bar}", flush=True)
    return int(not all(row.ok for row in rows))


if __name__ == "__main__":
    sys.exit(main())
