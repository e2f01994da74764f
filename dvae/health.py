"""What a dVAE run shows of itself at each held-out measurement: pictures, how often codes occur, and an alarm."""

import io
import json
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from cluster.manifest import write_bytes
from cluster.metrics import read_metrics
from cluster.process import largest_of
from cluster.run import Run
from cluster.settings import UserError
from dvae.config import DvaeTrainConfig
from dvae.measure import Measured, Measures

PICTURES, COUNTS = "reconstructions", "code_counts.json"
KEPT = 10  # newest files of pictures


def show(run: Run, step: int, measured: Measured) -> None:
    """Originals above reconstructions as `reconstructions/stepNNNNNNN.png`, of which the newest are kept, and in
    TensorBoard; how often each code occurs as a histogram there and, of the newest measurement, in
    `code_counts.json`. Rank 0 only acts.
    """
    if run.metrics is None:
        return
    sheet = torch.cat([torch.cat(list(rows), 2) for rows in (measured.originals, measured.drawn)], 1)
    folder = run.folder / PICTURES
    folder.mkdir(exist_ok=True)
    write_bytes(folder / f"step{step + 1:07d}.png", png_of(sheet))
    for old in sorted(folder.glob("step*.png"))[:-KEPT]:
        old.unlink()
    counts = measured.counts.tolist()
    write_bytes(run.folder / COUNTS, json.dumps({"step": step, "counts": counts}).encode())
    board = run.metrics.board
    board.add_image("val/originals_and_reconstructions", sheet, step)
    codes = np.arange(len(counts))
    board.add_histogram_raw(
        "val/codes", 0.0, float(len(counts)), sum(counts), float(codes @ counts), float(codes**2 @ counts),
        bucket_limits=(codes + 1).tolist(), bucket_counts=counts, global_step=step,
    )  # fmt: skip


def png_of(pixels: Tensor) -> bytes:
    """A PNG of (3, H, W) pixels in [0, 1]."""
    out = io.BytesIO()
    Image.fromarray((pixels * 255).round().byte().permute(1, 2, 0).numpy()).save(out, "png")
    return out.getvalue()


class Alarm:
    """Tells of codes that have collapsed, from some measurements in a row."""

    def __init__(self, config: DvaeTrainConfig, say: Callable[[str], None]) -> None:
        self.config, self._say, self._in_a_row = config, say, 0

    def go_on(self, run: Run) -> None:
        """Count on from the measurements that a resumed run has logged."""
        logged = read_metrics(run.folder) if run.place.is_main else []
        for values in logged:
            if values["step"] >= 0 and "val/codes_used" in values:
                self._count(values)
        self._in_a_row = largest_of(run.place, self._in_a_row)

    def look(self, step: int, values: Measures) -> None:
        """Say once what to change, as long as a collapse lasts. UserError if on_collapse=stop."""
        config = self.config
        self._count(values)
        if self._in_a_row != config.collapse_after:
            return
        used, perplexity = values["val/codes_used"], values["val/perplexity"]
        text = (
            f"the codes have collapsed at step {step}: {used:.2%} of {config.model.codebook} in use, perplexity "
            f"{perplexity:.3g}, below collapse_below={config.collapse_below:g} of the codebook in "
            f"{config.collapse_after} measurements in a row; {advice(config)}"
        )
        if config.on_collapse == "stop":
            raise UserError(text)
        self._say(text)

    def _count(self, values: Measures) -> None:
        share = min(values["val/codes_used"], values["val/perplexity"] / self.config.model.codebook)
        self._in_a_row = self._in_a_row + 1 if share < self.config.collapse_below else 0


def advice(config: DvaeTrainConfig) -> str:
    """What to change, most promising first."""
    schedule = config.schedule
    words = ["start=seeded (with model.n_groups=1)"] if config.start == "paper" else []
    words += [
        f"a schedule.lr below {schedule.lr:g}", f"a schedule.kl_steps above {schedule.kl_steps}",
        f"a schedule.temperature_steps above {schedule.temperature_steps}",
        f"a schedule.kl_weight above {schedule.kl_weight:g}",
    ]  # fmt: skip
    return f"begin again with {', or '.join(words)}"
