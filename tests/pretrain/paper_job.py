"""A job for test_paper_devices.py: `dalle-12b-tiny`, all devices of the authors' at once, on two "nodes" of two ranks.

    torchrun --nproc-per-node 4 --standalone -m tests.pretrain.paper_job FOLDER

FOLDER holds vocab and tokens. Trains FOLDER/whole from end to end, and FOLDER/halves that is told to stop half-way and
is begun again. Then rank 0 writes FOLDER/order.json: what one backward pass did, in order, and between which steps.
"""

import json
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from cluster.process import Place, joined_place
from cluster.watch import REQUEUE, Requeue, StopWatch
from data_pipeline.loader import TokenBatch
from pretrain import engine_start
from pretrain.config import TrainConfig
from pretrain.engine import Engine
from pretrain.engine_replicas import Replicas
from pretrain.engine_shards import Piece
from pretrain.model import Resblock, Sizes
from pretrain.train import COMMAND, train
from tests.pretrain.plan_peaks import with_limits

STEPS, STOPPED_AT = 6, 3  # a save: it makes the error buffers of replicas alike, which is part of the run
WORDS = [
    "dalle-12b-tiny", f"n_steps={STEPS}", f"evaluate_every={STEPS}", f"save_every={STOPPED_AT}", "optim.warmup_steps=2",
    "optim.average_every=2", "bpe_dropout=0.0",
]  # fmt: skip
SIZES = Sizes(text_vocab=40, codebook=16, grid=4)


def record_backward(engine: Engine, tell: Callable[[str, str], None]) -> None:
    """Tell when the backward pass enters a resblock: when the gradient of what it gave has come."""
    for name, block in engine.model.resblocks().items():

        def listen(module: Resblock, given: Any, made: tuple[Tensor, Tensor], name: str = name) -> None:
            if made[1].requires_grad:
                made[1].register_hook(lambda gradient: tell("enters", name))

        block.register_forward_hook(listen)


def order_of(config: TrainConfig, place: Place) -> list[tuple[str, str]]:
    """What happens in the second update: DeepSpeed learns the order of parameters in the first."""
    happened: list[tuple[str, str]] = []
    engine = Engine(config, SIZES, place)
    record_backward(engine, lambda what, name: happened.append((what, name)))
    send = Replicas._send

    def send_and_tell(self: Replicas, block: str, pieces: list[Piece]) -> None:
        send(self, block, pieces)
        happened.append(("met", block))

    random = torch.Generator().manual_seed(place.rank)
    text = torch.randint(SIZES.text_vocab, (4, config.model.n_text - 1), generator=random)
    image = torch.randint(SIZES.codebook, (4, SIZES.grid**2), generator=random)
    settle = engine._settlement.settle
    with (
        patch.object(Replicas, "_send", send_and_tell),
        patch.object(engine._settlement, "settle", lambda *a: (happened.append(("settles", "")), settle(*a))[1]),
    ):
        for step in range(2):
            happened.clear()
            engine.step(step, TokenBatch(text, image, ["a"] * 4))
    return happened


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    given = [*WORDS, f"tokens={folder}/tokens", f"vocab={folder}/vocab"]
    with joined_place(timeout_minutes=1.0) as place:
        train(COMMAND.settings([*given, f"out={folder}/whole"]), place)
        answers = iter([0] * (STOPPED_AT - 1) + [REQUEUE])
        with patch.object(StopWatch, "told_to_stop", lambda watch: next(answers)), suppress(Requeue):
            train(COMMAND.settings([*given, f"out={folder}/halves"]), place)
        train(COMMAND.settings([*given, f"out={folder}/halves"]), place)
        with patch.object(engine_start, "deepspeed_settings", with_limits({"reduce_bucket_size": 1_000})):
            happened = order_of(COMMAND.settings(WORDS), place)
        if place.is_main:
            (folder / "order.json").write_text(json.dumps(happened))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
