"""Trains small dVAEs on the ranks of one job: `torchrun -m tests.dvae.ranks_job DATA OUT`; tests compare the runs."""

import dataclasses
import sys
from pathlib import Path
from typing import Any

import torch

from cluster.process import Place, joined_place, wait_for_all
from cluster.run import Run
from cluster.watch import Requeue
from data_pipeline.loader import LoaderConfig
from dvae.config import DvaeConfig, DvaeTrainConfig, ScheduleConfig
from dvae.train import train

STEPS, STOP_AFTER = 10, 4
MODEL = DvaeConfig(image_side=16, fold=1, width=16, n_groups=2, n_blocks=1, n_init=16, codebook=64)
SCHEDULE = ScheduleConfig(lr=1e-3, lr_steps=STEPS, temperature_steps=STEPS, kl_steps=3)
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {"average_decay": 0.9},
    "checkpointed": {"average_decay": 0.9, "activation_checkpointing": "block"},
    "fp16": {"precision": "fp16"},
}


def settings(data: Path, out: Path, **changes: Any) -> DvaeTrainConfig:
    config = DvaeTrainConfig(
        images=str(data / "images"), out=str(out), n_steps=STEPS, evaluate_every=5, save_every=5,
        data=LoaderConfig(batch=6), model=MODEL, schedule=SCHEDULE,
    )  # fmt: skip
    return dataclasses.replace(config, **changes)


def train_to(config: DvaeTrainConfig, place: Place, stop_after: int) -> None:
    """As if all ranks were told to stop behind a step."""
    asked = iter(step + 1 == stop_after for step in range(STEPS))
    told_to_stop = Run.told_to_stop
    Run.told_to_stop = lambda self: next(asked)  # type: ignore[method-assign]
    try:
        train(config, place)
    except Requeue:
        pass
    finally:
        Run.told_to_stop = told_to_stop  # type: ignore[method-assign]
    wait_for_all(place)


def main(data: Path, out: Path) -> None:
    torch.set_num_threads(1)
    with joined_place(timeout_minutes=3.0) as place:
        for name, changes in VARIANTS.items():
            train(settings(data, out / name, **changes), place)
            again = settings(data, out / f"{name}-resumed", **changes)
            train_to(again, place, STOP_AFTER)
            train(again, place)
        train_to(settings(data, out / "left", **VARIANTS["plain"]), place, STOP_AFTER)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
