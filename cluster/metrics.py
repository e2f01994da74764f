"""Numbers of a run, from rank 0: TensorBoard and `metrics.jsonl`, and a progress line for people.

Tags follow the field's habit: `train/...`, `val/...`, `perf/...`, step on the x axis.
"""

import json
import math
import sys
import time
from pathlib import Path
from typing import Any

from torch.utils.tensorboard.writer import SummaryWriter
from tqdm import tqdm

from cluster.manifest import write_bytes
from cluster.records import read_records

LINE_SECONDS = 10.0  # between progress lines when the output is not a terminal


class Metrics:
    """Appends records to `folder/metrics.jsonl` and `folder/tensorboard/`.

    On a resume at `step`, records of later steps are dropped from the JSONL, so that it always
    reads as one uninterrupted run.
    """

    def __init__(self, folder: Path, step: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "metrics.jsonl"
        kept = [line for line in read_records(self.path) if line["step"] < step]
        write_bytes(self.path, "".join(json.dumps(line) + "\n" for line in kept).encode())
        self.file = open(self.path, "a")  # noqa: SIM115 - close() closes it
        self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=step)

    def record(self, step: int, values: dict[str, float]) -> None:
        self.file.write(json.dumps({"step": step, **values}) + "\n")
        self.file.flush()
        for tag, value in values.items():
            self.board.add_scalar(tag, value, step)

    def close(self) -> None:
        self.file.close()
        self.board.close()


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """All records of a run folder, oldest first."""
    return read_records(folder / "metrics.jsonl")


class Progress:
    """A progress bar with rate and ETA on a terminal; a line now and then elsewhere."""

    def __init__(self, what: str, total: int, done: int = 0, unit: str = "step") -> None:
        self.live = sys.stderr.isatty()
        self.bar = tqdm(total=total, initial=done, desc=what, unit=unit, disable=not self.live, dynamic_ncols=True)
        self.what, self.total, self.done, self.first, self.unit = what, total, done, done, unit
        self.start = self.last = time.monotonic()

    def advance(self, count: int = 1, note: str = "") -> None:
        """Count `count` more; `note` is shown beside the bar."""
        self.done += count
        if self.live:
            self.bar.set_postfix_str(note, refresh=False)
            self.bar.update(count)
            return
        now = time.monotonic()
        if now - self.last >= LINE_SECONDS or self.done >= self.total or self.done == self.first + count:
            self.last = now
            seconds = now - self.start
            rate = (self.done - self.first) / max(seconds, 1e-9)
            left = (self.total - self.done) / rate if rate else math.inf
            print(
                f"{self.what}: {self.done}/{self.total} {self.unit}s, {rate:.3g} {self.unit}s/s, "
                f"{left:.0f} s left{', ' + note if note else ''}",
                file=sys.stderr,
                flush=True,
            )

    def say(self, text: str) -> None:
        """A line of its own, above the bar."""
        tqdm.write(text, file=sys.stderr)

    def close(self) -> None:
        self.bar.close()
