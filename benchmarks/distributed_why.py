"""Rows and figures of benchmarks/distributed_scales.py: what one gradient scale loses, and one a resblock keeps."""

import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.distributed_jobs import Row, answers, last_json
from benchmarks.distributed_scales import FINE, ROOMS, SETTLED, STRESS
from cluster.metrics import read_metrics
from pretrain.plot import averaged, draw_scales, series

RUN_SECONDS = 3600
KINDS = {"one": "fp16-global", "own": "fp16-resblock"}
SHOWN = (20, 22, 24, STRESS)  # bits below overflow
COLORS = {"fp32": "0.2", "one": "tab:red", "own": "tab:blue"}


def why_rows(data: Path, folder: Path) -> list[Row]:
    """Train in float32, then with one scale and with many, each where its rule would bring it and STRESS bits
    below overflow; two processes side by side. The figures are left in the folder."""

    def command(*words: object) -> list[str]:
        return [sys.executable, "-m", "benchmarks.distributed_scales", *map(str, words)]

    reference = folder / "fp32"
    last = {"fp32": last_json(answers([command("train", data, reference, "fp32")], RUN_SECONDS)[0])}
    answers([command("probe", data, folder, reference)], RUN_SECONDS)
    for room in (SETTLED, STRESS):
        runs = {f"{kind}-{room}": precision for kind, precision in KINDS.items()}
        jobs = [command("train", data, folder / run, kind, room, reference) for run, kind in runs.items()]
        last |= dict(zip(runs, map(last_json, answers(jobs, RUN_SECONDS)), strict=True))
    found = json.loads((folder / "probe.json").read_text())
    draw(found, folder)
    return [norms_row(found), zeros_row(found), range_row(found), *loss_rows(last)]


def norms_row(found: dict[str, Any]) -> Row:
    """The gradient that enters a resblock, first over last: the paper's premise."""
    norms = list(found["norms"].values())
    falls = sum(later <= earlier for earlier, later in zip(norms[:-1], norms[1:], strict=True))
    note = (
        f"norm of the gradient into the first resblock over that into the last; {falls} of {len(norms) - 1} steps fall"
    )
    return Row("why/norms", norms[0] / norms[-1], 2.0, True, note, {"log2": [math.log2(norm) for norm in norms]})


def zeros_row(found: dict[str, Any]) -> Row:
    """At STRESS bits below overflow: the largest share of lost gradients that one scale adds in any resblock."""
    one, own = (found[kind][str(STRESS)] for kind in KINDS)
    excess = max(with_one - with_own for with_one, with_own in zip(one["zeros"], own["zeros"], strict=True))
    note = (
        f"{STRESS} bits below overflow, activation gradients that become 0 in the worst resblock: "
        f"{max(one['zeros']):.1%} with one scale, {max(own['zeros']):.1%} with their own; error of parameter "
        f"gradients {max(one['errors']):.1%} and {max(own['errors']):.1%}"
    )
    return Row("why/zeros", excess, 0.2, True, note, {"one": one, "own": own})


def room_of(curve: dict[str, Any]) -> float:
    """Bits below overflow at which a resblock's parameter gradients first err by FINE, between ROOMS by a line."""
    worst = [math.log2(max(curve[str(room)]["errors"])) for room in ROOMS]
    at = math.log2(FINE)
    for number in range(1, len(ROOMS)):
        low, high = worst[number - 1], worst[number]
        if low <= at < high:
            return ROOMS[number - 1] + (ROOMS[number] - ROOMS[number - 1]) * (at - low) / (high - low)
    return math.inf


def range_row(found: dict[str, Any]) -> Row:
    """Bits of float16's range that scales of their own give back."""
    rooms = {kind: room_of(found[kind]) for kind in KINDS}
    note = (
        f"scales may lie {rooms['one']:.1f} bits below overflow if there is one, {rooms['own']:.1f} if each has its own"
    )
    return Row(
        "why/range", rooms["own"] - rooms["one"], 2.0, True, f"{note}, before gradients err by {FINE:.0%}", rooms
    )


def loss_rows(last: dict[str, dict[str, float]]) -> list[Row]:
    """Held-out losses against float32's: where the rule puts the scales, and STRESS bits below overflow."""
    losses = {name: values["val/text_loss"] / 8 + values["val/image_loss"] * 7 / 8 for name, values in last.items()}
    worse = {name: loss / losses["fp32"] - 1 for name, loss in losses.items()}
    skipped = {name: int(values["skipped"]) for name, values in last.items()}

    def told(room: int) -> str:
        words = (f"{kind} {worse[f'{kind}-{room}']:+.2%} ({skipped[f'{kind}-{room}']} skipped)" for kind in KINDS)
        return (
            f"held-out loss against fp32's {losses['fp32']:.4f}, scales {room} bits below overflow: {', '.join(words)}"
        )

    settled = max(abs(worse[f"{kind}-{SETTLED}"]) for kind in KINDS)
    ratio = worse[f"one-{STRESS}"] / max(worse[f"own-{STRESS}"], 1e-4)
    return [
        Row("why/loss-settled", settled, 0.02, False, f"{told(SETTLED)}: no difference at this size"),
        Row("why/loss", ratio, 3.0, True, f"loss that one scale adds over what their own add; {told(STRESS)}", losses),
    ]


def draw(found: dict[str, Any], folder: Path) -> None:
    """zeros.png, losses.png and scales.png."""
    zeros, losses = Figure(figsize=(11, 4.4), dpi=90, layout="constrained"), Figure(figsize=(11, 4.4), dpi=90)
    losses.set_layout_engine("constrained")
    for axis, kind, title in zip(
        zeros.subplots(1, 2, sharey=True), KINDS, ("one scale for all", "one scale a resblock"), strict=True
    ):
        for number, room in enumerate(SHOWN):
            shares = 100 * np.array(found[kind][str(room)]["zeros"])
            axis.plot(shares, marker=".", color=f"C{number}", label=f"{room} bits below overflow")
        dress(axis, title, "resblock (0 is the first)")
    zeros.axes[0].set_ylabel("activation gradients that become 0 (%)")
    zeros.axes[1].legend(frameon=False, loc="upper left")
    zeros.savefig(folder / "zeros.png")
    for axis, room in zip(losses.subplots(1, 2, sharey=True), (SETTLED, STRESS), strict=True):
        runs = {
            "fp32": ("fp32", "float32"),
            "one": (f"one-{room}", "one scale"),
            "own": (f"own-{room}", "one a resblock"),
        }
        for kind, (run, label) in runs.items():
            updates, values = averaged(series(read_metrics(folder / run), "train/loss"), 40)
            axis.plot(updates, values, color=COLORS[kind], label=label, linestyle="--" if kind == "own" else "-")
        dress(axis, f"scales begin {room} bits below overflow", "update")
    losses.axes[0].set_ylabel("training loss, mean of 5 updates")
    losses.axes[0].legend(frameon=False)
    losses.savefig(folder / "losses.png")
    scales = draw_scales([folder / f"own-{SETTLED}"])
    scales.set_dpi(80)
    scales.savefig(folder / "scales.png")


def dress(axis: Axes, title: str, across: str) -> None:
    axis.set_title(title, fontsize=11)
    axis.set_xlabel(across)
    axis.grid(alpha=0.3)
