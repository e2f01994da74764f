"""`smalti plot`: what the curves show is what was recorded, and a run without it is told in one line."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cluster.command import run_command
from cluster.manifest import FolderError
from cluster.metrics import Metrics
from pretrain.plot import COMMAND, averaged, draw_losses, draw_scales, names_of, series, thinned

N_LAYERS, N_UPDATES = 12, 40
BLOCKS = [(layer, part) for layer in range(N_LAYERS) for part in ("attention", "mlp")]


def record(folder: Path, lines: list[dict[str, float]]) -> Path:
    metrics = Metrics(folder, 0)
    for step, line in enumerate(lines):
        metrics.record(step, line)
    metrics.close()
    return folder


@pytest.fixture
def scaled(tmp_path: Path) -> Path:
    """A run of 12 layers; a resblock's scale starts at its number and falls by 1/2 at each of its skips."""
    lines = []
    for step in range(N_UPDATES):
        skips = {block: max(0, step - 3 * number) // 10 for number, block in enumerate(BLOCKS)}
        scales = {f"scale/layers.{a}.{b}": n - skips[a, b] / 2 for n, (a, b) in enumerate(BLOCKS)}
        lines.append(scales | {f"skips/layers.{a}.{b}": float(skips[a, b]) for a, b in BLOCKS} | {"train/loss": 3.0})
    return record(tmp_path / "scaled", lines)


def trained(folder: Path, above: float = 0.0, count: int = 1000) -> Path:
    """A run whose losses fall from 9, with a held-out one after each 100 updates and one that is not a number."""
    lines = []
    for step in range(count):
        loss = above + 4.0 + 5.0 * math.exp(-step / 20)
        held = {"val/image_loss": loss + 0.5, "val/text_loss": loss} if step % 100 == 99 else {}
        lines.append({"train/loss": loss, "train/image_loss": loss, "train/text_loss": loss - 1} | held)
    lines[5]["train/image_loss"] = math.nan
    return record(folder, lines)


def test_the_words_of_the_help_draw_a_png(scaled: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(COMMAND, ["scales", str(scaled)]) == 0
    assert capsys.readouterr().out.strip() == str(scaled / "scales.png")
    with Image.open(scaled / "scales.png") as picture:
        assert picture.format == "PNG" and picture.width > 1000


def test_several_runs_follow_one_another(tmp_path: Path) -> None:
    runs = [str(trained(tmp_path / name)) for name in ("b", "a")]
    assert run_command(COMMAND, ["losses", *runs]) == 0 and (tmp_path / "b" / "losses.png").is_file()
    assert run_command(COMMAND, ["losses", *runs, "--out", str(tmp_path / "both.png")]) == 0
    assert run_command(COMMAND, ["--figure", "losses", f"runs={','.join(runs)}", f"out={tmp_path}/same.png"]) == 0
    assert (tmp_path / "both.png").read_bytes() == (tmp_path / "same.png").read_bytes()
    file = tmp_path / "plot.toml"
    file.write_text(f"out = '{tmp_path}/file.png'\nruns = {runs}")
    assert run_command(COMMAND, ["losses", str(file)]) == 0
    assert (tmp_path / "file.png").read_bytes() == (tmp_path / "same.png").read_bytes()


def test_every_resblock_has_its_curve_and_its_skips_below(scaled: Path) -> None:
    axes = draw_scales([scaled]).axes
    panels = {("scale", "attention"): 0, ("scale", "mlp"): 1, ("skips", "attention"): 2, ("skips", "mlp"): 3}
    lines = [json.loads(line) for line in (scaled / "metrics.jsonl").read_text().splitlines()]
    for (kind, part), panel in panels.items():
        curves = axes[panel].lines
        assert len(curves) == N_LAYERS
        for layer, curve in enumerate(curves):
            assert list(curve.get_xdata()) == list(range(1, N_UPDATES + 1))
            assert list(curve.get_ydata()) == [line[f"{kind}/layers.{layer}.{part}"] for line in lines]
            assert curve.get_drawstyle() == "steps-post"  # a skip is a jump, not a slope


def test_colours_tell_depth_and_the_bar_names_it(scaled: Path) -> None:
    figure = draw_scales([scaled])
    *panels, bar = figure.axes
    colors = [[tuple(line.get_color()) for line in panel.lines] for panel in panels]
    assert colors == [colors[0]] * 4 and len({*colors[0]}) == N_LAYERS
    light = [0.3 * red + 0.6 * green + 0.1 * blue for red, green, blue, _ in colors[0]]
    assert light == sorted(light)
    assert [round(tick) for tick in (bar.get_yticks()[0], bar.get_yticks()[-1])] == [0, N_LAYERS - 1]
    assert "layer" in bar.get_ylabel() and "log2" in panels[0].get_ylabel()


def test_a_run_without_scales_or_records_is_told_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = trained(tmp_path / "run")
    for words, told in (
        (["scales", str(run)], f"{run} recorded no gradient scales"),
        (["losses", str(tmp_path / "none")], f"{tmp_path / 'none'} holds no metrics.jsonl"),
        (["losses", str(record(tmp_path / "other", [{"train/lr": 1.0}]))], f"{tmp_path / 'other'} recorded no losses"),
    ):
        assert run_command(COMMAND, words) == 1
        said = capsys.readouterr()
        assert said.err.startswith(f"smalti plot: {told}") and said.err.count("\n") == 1 and not said.out
    assert not list(tmp_path.rglob("*.png"))
    assert run_command(COMMAND, ["scales", str(run), str(run)]) == 2
    assert "one run" in capsys.readouterr().err


def test_losses_of_runs_share_panels_and_are_named(tmp_path: Path) -> None:
    figure = draw_losses([trained(tmp_path / "first" / "train"), trained(tmp_path / "second" / "train", 0.25)])
    assert [axis.get_title().split(" (")[0] for axis in figure.axes] == ["image loss", "text loss"]
    train, heldout, other_train, other_heldout = figure.axes[0].lines
    assert list(heldout.get_xdata()) == list(range(100, 1001, 100))
    assert heldout.get_ydata()[-1] == pytest.approx(4.5) and other_heldout.get_ydata()[-1] == pytest.approx(4.75)
    assert train.get_color() == heldout.get_color() != other_train.get_color() == other_heldout.get_color()
    assert train.get_ydata()[-1] == pytest.approx(4.0) and train.get_xdata()[-1] == 1000
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names == ["first/train", "second/train", "training, mean of\nup to 7 updates", "held-out"]


def test_the_start_is_left_out_of_the_view_and_that_is_said(tmp_path: Path) -> None:
    axis = draw_losses([trained(tmp_path / "run")]).axes[0]
    assert axis.get_ylim()[1] < 5.0 and "lies above" in axis.texts[0].get_text()
    flat = record(tmp_path / "flat", [{"train/loss": 3.0 + step % 2} for step in range(50)])
    figure = draw_losses([flat])
    assert figure.axes[0].get_ylim()[1] > 4.0 and not figure.axes[0].texts
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["flat", "training"]


def test_a_run_of_one_update_is_drawn(tmp_path: Path) -> None:
    assert draw_losses([record(tmp_path / "run", [{"train/loss": 3.0}])]).axes[0].lines
    with pytest.raises(FolderError, match="no gradient scales"):
        draw_scales([tmp_path / "run"])


def test_a_series_counts_updates_and_passes_over_what_is_not_finite() -> None:
    records = [{"step": 0, "a": 5.0}, {"step": 1, "a": math.nan}, {"step": 1, "b": 1.0}, {"step": 2, "a": 6.0}]
    updates, values = series(records, "a")
    assert updates.tolist() == [1, 3] and values.tolist() == [5.0, 6.0]
    assert [len(one) for one in series(records, "c")] == [0, 0]


def test_thinning_keeps_every_dip_and_peak_in_order() -> None:
    values = np.sin(np.arange(100_000) / 3000)
    values[54_321], values[77_777] = -5.0, 5.0
    updates, kept = thinned((np.arange(100_000), values), 200)
    assert len(kept) <= 200 and updates.tolist() == sorted(updates.tolist())
    assert {54_321, 77_777} <= {*updates.tolist()} and (values[updates] == kept).all()
    assert thinned((np.arange(5), np.arange(5.0)), 5)[0].tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("count", [10, 11, 19, 20, 1003])
def test_means_count_every_value_once(count: int) -> None:
    values = np.arange(count) ** 2.0
    updates, means = averaged((np.arange(1, count + 1), values), 10)
    sizes = np.diff([0, *updates])
    assert len(means) == 10 and updates[-1] == count and sizes.max() - sizes.min() <= 1
    assert (means * sizes).sum() == pytest.approx(values.sum(), rel=1e-12)
    assert means[0] == pytest.approx(values[: sizes[0]].mean(), rel=1e-12)


def test_names_are_as_short_as_they_can_be() -> None:
    assert names_of([Path("x/runs/a"), Path("x/runs/b")]) == ["a", "b"]
    assert names_of([Path("x/a/train"), Path("x/b/train")]) == ["a/train", "b/train"]
    assert names_of([Path("a"), Path("a")]) == ["a (1)", "a (2)"]
