"""Draw the curves of runs as a PNG: losses, or the gradient scales of the resblocks.

    smalti plot losses runs/train                   training and held-out losses
    smalti plot losses runs/a runs/b out=ab.png     of several runs, one colour each
    smalti plot scales runs/train                   figure 12 of the paper, and the updates that were skipped

Works on any trainer's run folder, with or without the run going on; writes RUN/losses.png or RUN/scales.png.
"""

import io
import math
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import BoundaryNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, MaxNLocator

from cluster.command import Command, run_command
from cluster.manifest import FolderError, write_bytes
from cluster.metrics import read_metrics
from cluster.settings import SettingError, setting, split_words

Points = tuple[np.ndarray, np.ndarray]  # updates done, values

PARTS = ("attention", "mlp")  # of a layer; each is a resblock with a scale of its own
SCALE_TAG = re.compile(r"scale/layers\.(\d+)\.(attention|mlp)")
LOSSES = {  # tag without train/ or val/ -> title with its unit
    "image_loss": "image loss (nats per token)",
    "text_loss": "text loss (nats per token)",
    "loss": "training loss",
    "nats": "loss (nats per pixel value)",
}
MOST_POINTS = 2000  # drawn of a curve of scales: more than pixels across
MOST_MEANS = 150  # stretches that a training loss is averaged over
EARLY = 0.1  # of the updates: what lies far above all later values there is left out, so that the rest is seen
FAR = 0.5  # of the later values' range
COLORS = tuple(colormaps["tab10"].colors)  # type: ignore[attr-defined]
DEPTHS = "viridis"
TRAINING: dict[str, Any] = {"linewidth": 1.3, "alpha": 0.6}
HELD_OUT: dict[str, Any] = {"linewidth": 1.3, "linestyle": "--", "marker": "o", "markersize": 3.5}


@dataclass(frozen=True)
class PlotConfig:
    """What is drawn, and of which runs."""

    figure: Literal["losses", "scales"] = setting("losses", "what to draw (first plain word)")
    runs: tuple[str, ...] = setting(("runs/train",), "run folders (the other plain words); scales takes one")
    out: str = setting("", "PNG to write; empty is losses.png or scales.png in the first run's folder")

    def __post_init__(self) -> None:
        if not self.runs or (self.figure == "scales" and len(self.runs) > 1):
            wanted = "one run" if self.figure == "scales" else "at least one run"
            raise SettingError(f"plot {self.figure} takes {wanted}, not {len(self.runs)}")


class PlotCommand(Command):
    """A verb whose last plain setting takes all the words that follow."""

    def settings(self, words: list[str]) -> PlotConfig:
        names, changes = split_words(words)
        plain = [name for name in names if not name.endswith(".toml")]
        files = [name for name in names if name.endswith(".toml")]
        listed = [*plain[:1], ",".join(plain[1:])] if plain[1:] else plain
        return super().settings([*listed, *files, *(f"--{key}={text}" for key, text in changes)])


def plot(config: PlotConfig) -> None:
    """Draw and write; see the module's text. FolderError if a run recorded nothing of the kind."""
    draw: dict[str, Callable[[list[Path]], Figure]] = {"losses": draw_losses, "scales": draw_scales}
    runs = [Path(run) for run in config.runs]
    figure = draw[config.figure](runs)
    out = Path(config.out) if config.out else runs[0] / f"{config.figure}.png"
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    write_bytes(out, buffer.getvalue())
    print(out)


def draw_scales(runs: list[Path]) -> Figure:
    """log2 of each resblock's gradient scale over the updates, coloured by depth, above the skips so far of each."""
    (run,) = runs
    records = records_of(run)
    found = {match[1] for record in records for tag in record if (match := SCALE_TAG.fullmatch(tag))}
    if not found:
        raise FolderError(f"{run} recorded no gradient scales of resblocks; a run with precision=fp16-resblock does")
    layers = sorted(int(layer) for layer in found)
    colors, width = _depth_colors(layers), 1.4 if len(layers) <= 16 else 0.7
    figure = Figure(figsize=(12, 7.2), dpi=110, layout="constrained")
    axes = figure.subplots(2, 2, sharex=True, sharey="row", gridspec_kw={"height_ratios": [2, 1]})
    for column, part in enumerate(PARTS):
        for row, tag in enumerate(("scale", "skips")):
            axis = axes[row, column]
            for layer, tint in zip(layers, colors.to_rgba(np.array(layers)), strict=True):
                updates, values = thinned(series(records, f"{tag}/layers.{layer}.{part}"))
                axis.plot(updates, values, color=tint, linewidth=width, drawstyle="steps-post")
            _dress(axis, whole=True)
        axes[0, column].set_title({"attention": "attention resblocks", "mlp": "MLP resblocks"}[part], fontsize=11)
        axes[1, column].set_xlabel("update")
    axes[0, 0].set_ylabel("gradient scale (log2)")
    axes[1, 0].set_ylabel("updates skipped so far")
    axes[1, 0].set_ylim(bottom=0)
    bar = figure.colorbar(colors, ax=axes, pad=0.015, fraction=0.03, aspect=40)
    bar.set_label("layer (0 is the first)")
    bar.set_ticks(_depth_ticks(layers))
    bar.ax.minorticks_off()
    figure.suptitle(f"{run.name}: one gradient scale a resblock, {len(layers) * len(PARTS)} in all", fontsize=13)
    return figure


def draw_losses(runs: list[Path]) -> Figure:
    """A panel a loss: training and held-out values over the updates, a colour a run."""
    records = {name: records_of(run) for name, run in zip(names_of(runs), runs, strict=True)}
    tags = {tag for lines in records.values() for line in lines for tag in line}
    shown = [name for name in LOSSES if {f"train/{name}", f"val/{name}"} & tags]
    if {"image_loss", "nats"} & {*shown}:  # "loss" is only a mixture of the others
        shown = [name for name in shown if name != "loss"]
    if not shown:
        raise FolderError(f"{', '.join(map(str, runs))} recorded no losses")
    figure = Figure(figsize=(2.5 + 5.5 * len(shown), 5.2), dpi=110, layout="constrained")
    colors = _run_colors(len(runs))
    every, is_held_out = 1, False
    for axis, name in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown, strict=True):
        curves = []
        for color, lines in zip(colors, records.values(), strict=True):
            train, heldout = (series(lines, f"{of}/{name}") for of in ("train", "val"))
            every, is_held_out = max(every, stretch(train)), is_held_out or len(heldout[0]) > 0
            curves += [averaged(train), heldout]
            axis.plot(*averaged(train), color=color, **TRAINING)
            axis.plot(*heldout, color=color, **HELD_OUT)
        _dress(axis)
        _leave_out_the_start(axis, curves)
        axis.set_title(LOSSES[name], fontsize=11)
        axis.set_xlabel("update")
    handles = [Line2D([], [], color=tint, linewidth=4, label=name) for tint, name in zip(colors, records, strict=True)]
    mean = f"training, mean of\nup to {every:,} updates" if every > 1 else "training"
    handles.append(Line2D([], [], color="0.35", label=mean, **TRAINING))
    if is_held_out:
        handles.append(Line2D([], [], color="0.35", label="held-out", **HELD_OUT))
    figure.legend(handles=handles, loc="outside right upper", frameon=False)
    return figure


def records_of(run: Path) -> list[dict[str, Any]]:
    """A run's records; FolderError if it has none."""
    records = read_metrics(run)
    if not records:
        raise FolderError(f"{run} holds no metrics.jsonl with records; name the run folder, as runs/train")
    return records


def names_of(runs: list[Path]) -> list[str]:
    """The shortest ends of the paths that tell the runs apart; a run named twice keeps its whole path, and a number."""
    paths = [run.resolve().parts for run in runs]
    for length in range(1, max(map(len, paths)) + 1):
        names = ["/".join(parts[-length:]) for parts in paths]
        if len({*names}) == len(names):
            return names
    return [f"{run} ({number})" for number, run in enumerate(runs, 1)]


def series(records: list[dict[str, Any]], tag: str) -> Points:
    """(updates done, values) of the finite values under a tag, oldest first."""
    points = [(line["step"] + 1, line[tag]) for line in records if tag in line and math.isfinite(line[tag])]
    updates, values = zip(*points, strict=True) if points else ((), ())
    return np.array(updates, dtype=np.int64), np.array(values, dtype=np.float64)


def thinned(points: Points, most: int = MOST_POINTS) -> Points:
    """At most so many of the points: of each stretch its lowest and its highest, so that no dip is lost, in order."""
    updates, values = points
    if len(values) <= most:
        return points
    edges = np.linspace(0, len(values), most // 2 + 1).astype(int)
    kept = {
        int(first + of(values[first:last]))
        for first, last in zip(edges[:-1], edges[1:], strict=True)
        for of in (np.argmin, np.argmax)
    }
    chosen = np.array(sorted(kept))
    return updates[chosen], values[chosen]


def stretch(points: Points, most: int = MOST_MEANS) -> int:
    """Values that one mean of `averaged` is taken over, at most."""
    return max(1, math.ceil(len(points[1]) / most))


def averaged(points: Points, most: int = MOST_MEANS) -> Points:
    """At most so many means, over stretches of as equally many values as can be, at the last update of each."""
    updates, values = points
    if len(values) <= most:
        return points
    edges = np.linspace(0, len(values), most + 1).astype(int)
    return updates[edges[1:] - 1], np.add.reduceat(values, edges[:-1]) / np.diff(edges)


def _leave_out_the_start(axis: Axes, curves: list[Points]) -> None:
    """Bound the view by what comes after the first tenth of the updates, and say so, if that shows much more."""
    end = max((updates[-1] for updates, _ in curves if len(updates)), default=0)
    late = np.concatenate([values[updates >= EARLY * end] for updates, values in curves])
    whole = np.concatenate([values for _, values in curves])
    if not len(late) or whole.max() - late.max() <= FAR * (late.max() - late.min()):
        return
    bottom, top = whole.min(), late.max()
    margin = 0.05 * (top - bottom) or 0.05 * abs(top) or 1.0
    axis.set_ylim(bottom - margin, top + margin)
    words = f"the start, up to {whole.max():.3g}, lies above"
    axis.text(0.98, 0.98, words, transform=axis.transAxes, ha="right", va="top", fontsize=8, color="0.35")


def _dress(axis: Axes, whole: bool = False) -> None:
    """whole: the values are marked at whole numbers only."""
    axis.grid(alpha=0.3)
    axis.xaxis.set_major_formatter(EngFormatter(sep=""))  # 50k
    axis.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=[1, 2, 5, 10]))
    axis.yaxis.set_major_locator(MaxNLocator(9, integer=whole, steps=[1, 2, 5, 10]))
    axis.margins(x=0.01)


def _depth_colors(layers: list[int]) -> ScalarMappable:
    """Colours of the layers from first to last; a step a layer where there are few."""
    first, last = layers[0], max(layers[-1], layers[0] + 1)
    if last - first < 12:
        norm: Normalize = BoundaryNorm([layer - 0.5 for layer in range(first, last + 2)], 256)
    else:
        norm = Normalize(first, last)
    return ScalarMappable(norm, DEPTHS)


def _depth_ticks(layers: list[int]) -> list[int]:
    """The first and the last, and up to seven between."""
    if len(layers) < 12:
        return layers
    return sorted({round(layer) for layer in np.linspace(layers[0], layers[-1], 9)})


def _run_colors(count: int) -> list[Any]:
    """Ten that are easily told apart; of more runs, a range."""
    return list(COLORS[:count]) if count <= len(COLORS) else list(colormaps["turbo"](np.linspace(0.05, 0.95, count)))


COMMAND = PlotCommand("plot", PlotConfig, Path(__file__).parent / "configs" / "plot", plot, __doc__, ("figure", "runs"))

if __name__ == "__main__":
    sys.exit(run_command(COMMAND, sys.argv[1:]))
