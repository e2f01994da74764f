"""What one update does when its numbers are bad, and what a late average begins with."""

import dataclasses
import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.ledger import NAME as LEDGER
from cluster.process import Place
from cluster.settings import UserError
from data_pipeline.folders import Shards
from data_pipeline.loader import ImageBatch, ImageBatches, LoaderConfig
from dvae import trainer
from dvae.config import DvaeConfig, DvaeTrainConfig
from dvae.train import train
from dvae.trainer import Trainer

ALONE = Place(0, 1, torch.device("cpu"))
SHAPE = DvaeConfig(image_side=16, fold=1, width=16, n_groups=2, n_blocks=1, n_init=16, codebook=32)


def made(data: Path, **changes: Any) -> tuple[Trainer, ImageBatch]:
    config = dataclasses.replace(DvaeTrainConfig(model=SHAPE, data=LoaderConfig(batch=4)), **changes)
    shards = Shards(data / "images", "images", "train")
    return Trainer(config, shards, ALONE), next(ImageBatches(shards, config.data, 16, True))


def weights(one: Trainer) -> list[torch.Tensor]:
    return [p.detach().clone() for p in one.model.parameters()]


def begin_at(scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """With another first loss scale than torch's 65536."""
    monkeypatch.setattr(trainer.torch.amp, "GradScaler", partial(torch.amp.GradScaler, init_scale=scale))


def test_an_overflow_leaves_out_the_update_and_halves_the_scale(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begin_at(2.0**60, monkeypatch)
    one, batch = made(data, precision="fp16")
    before = weights(one)
    update = one.step(0, batch)
    assert update.why_not == f"overflow at a loss scale of {2.0**60:g}"
    assert update.values["train/loss_scale"] == 2.0**59
    assert all(torch.equal(a, b) for a, b in zip(before, weights(one), strict=True))
    for number in range(1, 60):
        update = one.step(number, batch)
        if not update.why_not:
            break
    assert not update.why_not and not torch.equal(before[0], weights(one)[0])


def test_what_no_scale_can_cure_ends_the_run(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begin_at(1.5, monkeypatch)
    for precision, told in (("fp16", "with a loss scale of 0.75"), ("fp32", "nan at step")):
        one, batch = made(data, precision=precision)
        bad = dataclasses.replace(batch, pixels=batch.pixels * float("nan"))
        with pytest.raises(UserError, match=told):
            for number in range(2):
                one.step(number, bad)


def test_a_left_out_update_is_in_the_ledger(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begin_at(2.0**60, monkeypatch)
    config = DvaeTrainConfig(
        images=str(data / "images"), out=str(tmp_path), n_steps=1, precision="fp16", model=SHAPE,
        data=LoaderConfig(batch=4),
    )  # fmt: skip
    train(config, ALONE)
    lines = [json.loads(line) for line in (tmp_path / LEDGER).read_text().splitlines()]
    assert lines[-1]["skipped"].startswith("overflow")


def test_an_average_that_begins_late_begins_with_the_weights(data: Path, tmp_path: Path) -> None:
    one, batch = made(data)
    one.step(0, batch)
    (tmp_path / "global_step1").mkdir()
    one.save(tmp_path, "global_step1")
    late, _ = made(data, average_decay=0.9)
    late.load(tmp_path, "global_step1")
    assert late.released is not late.model
    assert all(torch.equal(a, b) for a, b in zip(weights(one), late.released.parameters(), strict=True))
