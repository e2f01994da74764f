"""A run shows what it draws and which codes it uses, and raises the alarm when they collapse."""

import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cluster.manifest import read_manifest
from cluster.metrics import read_metrics
from cluster.process import Place
from cluster.run import Run
from cluster.settings import SettingError, UserError
from cluster.watch import Requeue
from data_pipeline.loader import LoaderConfig
from dvae import health
from dvae.config import DvaeConfig, DvaeTrainConfig
from dvae.health import COUNTS, PICTURES, Alarm, png_of
from dvae.train import train
from tests.dvae.test_measure import Channels

ALONE = Place(0, 1, torch.device("cpu"))
SHAPE = DvaeConfig(image_side=16, fold=4, width=16, n_groups=1, n_blocks=1, n_init=16, codebook=32)


def settings(data: Path, out: Path, **changes: Any) -> DvaeTrainConfig:
    config = DvaeTrainConfig(
        images=str(data / "images"), out=str(out), n_steps=4, evaluate_every=1, save_every=4, start="seeded",
        data=LoaderConfig(batch=4), model=SHAPE,
    )  # fmt: skip
    return dataclasses.replace(config, **changes)


def test_a_run_keeps_pictures_counts_and_their_histogram(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(health, "KEPT", 3)
    train(settings(data, tmp_path / "run"), ALONE)
    pictures = sorted(path.name for path in (tmp_path / "run" / PICTURES).iterdir())
    assert pictures == ["step0000002.png", "step0000003.png", "step0000004.png"]
    n_heldout = read_manifest(data / "images", "images").counts["heldout"]
    with Image.open(tmp_path / "run" / PICTURES / pictures[0]) as sheet:
        assert sheet.size == (16 * min(8, n_heldout), 32)
    told = json.loads((tmp_path / "run" / COUNTS).read_text())
    assert told["step"] == 3 and len(told["counts"]) == 32 and sum(told["counts"]) == 16 * n_heldout
    last = [line for line in read_metrics(tmp_path / "run") if "val/codes_used" in line][-1]
    assert last["val/codes_used"] == sum(count > 0 for count in told["counts"]) / 32
    board = EventAccumulator(str(tmp_path / "run" / "tensorboard"), {"images": 0, "histograms": 0}).Reload()
    assert [one.step for one in board.Images("val/originals_and_reconstructions")] == [-1, 0, 1, 2, 3]
    shown = board.Histograms("val/codes")[-1].histogram_value
    assert list(shown.bucket) == told["counts"] and shown.num == sum(told["counts"])


def test_the_frechet_distance_of_a_finished_run_is_in_its_manifest(data: Path, tmp_path: Path) -> None:
    torch.jit.script(Channels()).save(str(tmp_path / "toy.pt"))
    config = settings(data, tmp_path / "run", start="paper", n_steps=1, fid_inception=str(tmp_path / "toy.pt"))
    train(config, ALONE)
    found = read_manifest(tmp_path / "run", "dvae").counts["val/fid"]
    assert found > 0 and read_metrics(tmp_path / "run")[-1] == {"step": 0, "val/fid": found}
    (tmp_path / "toy.pt").rename(tmp_path / "moved.pt")  # where the file lies is no part of what the run is
    train(dataclasses.replace(config, fid_inception=str(tmp_path / "moved.pt")), ALONE)


def test_a_png_holds_the_pixels() -> None:
    pixels = torch.rand(3, 4, 6)
    with Image.open(io.BytesIO(png_of(pixels))) as image:
        assert np.array_equal(np.asarray(image), (pixels * 255).round().byte().permute(1, 2, 0).numpy())


def values(used: float, perplexity: float) -> dict[str, float]:
    return {"val/codes_used": used, "val/perplexity": perplexity}


HEALTHY, FEW, UNEVEN = values(0.5, 9.0), values(0.05, 2.0), values(0.9, 1.5)  # of 32 codes


def alarm(**changes: Any) -> tuple[Alarm, list[str]]:
    said: list[str] = []
    config = DvaeTrainConfig(model=SHAPE, collapse_below=0.1, collapse_after=2, **changes)
    return Alarm(config, said.append), said


@pytest.mark.parametrize("sick", [FEW, UNEVEN])
def test_a_collapse_is_told_once_as_long_as_it_lasts(sick: dict[str, float]) -> None:
    one, said = alarm()
    for step, seen in enumerate([sick, HEALTHY, sick, sick, sick, HEALTHY, sick, sick]):
        one.look(step, seen)
    assert len(said) == 2 and "collapsed at step 3" in said[0] and "collapsed at step 7" in said[1]
    assert "start=seeded" in said[0] and "schedule.lr below 0.0001" in said[0] and "\n" not in said[0]


def test_a_seeded_run_is_not_told_to_be_seeded() -> None:
    one, said = alarm(start="seeded")
    for step in range(2):
        one.look(step, FEW)
    assert "start=seeded" not in said[0] and "schedule.kl_steps above 5000" in said[0]


def test_a_collapse_ends_the_run_if_it_shall(data: Path, tmp_path: Path) -> None:
    sick = {"collapse_below": 0.99, "collapse_after": 2, "start": "paper"}
    train(settings(data, tmp_path / "goes-on", **sick), ALONE)
    with pytest.raises(UserError, match="collapsed at step 1:"):
        train(settings(data, tmp_path / "ends", on_collapse="stop", **sick), ALONE)


def test_a_resumed_run_counts_on(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Stopped after two sick measurements, of which the one before the first step does not count: a third is told."""
    config = settings(data, tmp_path / "run", start="paper", collapse_below=0.99, collapse_after=3)
    asked = iter([False, True])
    with monkeypatch.context() as patch:
        patch.setattr(Run, "told_to_stop", lambda self: next(asked))
        with pytest.raises(Requeue):
            train(config, ALONE)
    assert "collapsed" not in capsys.readouterr().out
    train(config, ALONE)
    assert capsys.readouterr().out.count("collapsed at step 2:") == 1


@pytest.mark.parametrize(("name", "value"), [("average_decay", 1.0), ("collapse_below", -0.1), ("collapse_after", 0)])
def test_settings_out_of_range_are_refused(name: str, value: float) -> None:
    with pytest.raises(SettingError, match=f"{name}={value}"):
        DvaeTrainConfig(**{name: value})
