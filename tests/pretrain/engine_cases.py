"""A worker of a distributed job: trains a small random model in each of several ways, and writes what came of it.

    torchrun --nproc-per-node 4 --standalone -m tests.pretrain.engine_cases FOLDER NAME...

Writes FOLDER/NAME.pt: losses, metrics and, from rank 0, the weights. Without a launcher it is a world of one.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from cluster.power_sgd import PowerSGDConfig
from cluster.process import Place, joined_place
from cluster.weights import WEIGHTS
from data_pipeline.loader import PAD, LoaderConfig, TokenBatch
from pretrain.config import OptimConfig, TrainConfig, TransformerConfig
from pretrain.engine import Engine
from pretrain.engine_shards import Piece
from pretrain.engine_update import Update
from pretrain.model import Sizes
from pretrain.optim import resblock_of

SIZES = Sizes(text_vocab=24, codebook=16, grid=4)
MODEL = TransformerConfig(n_text=8, n_layers=4, n_heads=2, d_head=16, conv_kernel=3)
BATCH, STEPS = 16, 20
OPTIM = OptimConfig(lr=3e-3, warmup_steps=4, clip=0.3)
WHOLE = PowerSGDConfig(rank=10_000, start_step=0, least_saving=0.0, wire="fp32")
LOW = PowerSGDConfig(rank=8, start_step=2, wire="1-6-9", errors="1-6-9")
INJECTED_AT, INJECTED_INTO, INJECTED_ON = 6, "layers.2.mlp", 1  # step, resblock, rank


@dataclass(frozen=True)
class Case:
    """How the engine is asked to train, and what befalls it."""

    settings: dict[str, Any] = field(default_factory=dict)
    befalls: Callable[[Engine, int], None] = lambda engine, step: None


def inject_inf(engine: Engine, step: int) -> None:
    """An Inf in one gradient of one resblock on one rank, as soon as it is averaged within the shard group."""
    if step != INJECTED_AT or engine.place.rank != INJECTED_ON:
        return
    replicas, shards = engine._settlement.replicas, engine._shards
    if replicas:
        send = replicas._send

        def send_spoilt(block: str, pieces: list[Piece]) -> None:
            if block == INJECTED_INTO:
                replicas._send = send  # type: ignore[method-assign]
                pieces[0].gradient[0] = torch.inf
            send(block, pieces)

        replicas._send = send_spoilt  # type: ignore[method-assign]
        return
    pieces_of = shards.pieces

    def spoilt() -> list[list[Piece]]:
        groups = pieces_of()
        shards.pieces = pieces_of  # type: ignore[method-assign]
        piece = next(piece for group in groups for piece in group if piece.name.startswith(INJECTED_INTO))
        piece.gradient[0] = torch.inf
        return groups

    shards.pieces = spoilt  # type: ignore[method-assign]


def overflow_factor(engine: Engine, step: int) -> None:
    """A gradient that float32 holds, and a 1-6-9 factor does not."""
    assert engine._replicas is not None
    if step == INJECTED_AT:
        for error in engine._replicas._errors.values():
            error.fill_(0x7DFF)  # the largest number of 1-6-9


FP16 = {"precision": "fp16-resblock"}
CASES = {
    "stage1": Case({"zero_stage": 1}),
    "stage2": Case({"zero_stage": 2}),
    "stage3": Case({"zero_stage": 3}),
    "stage3_parts": Case(
        {"zero_stage": 3, "accumulate": 2, "activation_checkpointing": "resblock", "offload_activations": True}
    ),
    "stage1_offload": Case({"zero_stage": 1, "offload_optimizer": True}),
    "stage3_offload": Case({"zero_stage": 3, "offload_optimizer": True}),
    "fp16_stage1": Case(FP16 | {"zero_stage": 1}),
    "fp16_stage2_parts": Case(FP16 | {"zero_stage": 2, "accumulate": 2}),
    "fp16_stage3_checkpointed": Case(FP16 | {"zero_stage": 3, "activation_checkpointing": "resblock"}),
    "fp16_global": Case({"precision": "fp16-global"}),
    "inf_stage1": Case(FP16 | {"zero_stage": 1}, inject_inf),
    "inf_stage3": Case(FP16 | {"zero_stage": 3}, inject_inf),
    "inf_block": Case(FP16 | {"zero_stage": 2, "on_overflow": "block"}, inject_inf),
    "inf_fp32": Case({"zero_stage": 2}, inject_inf),
    "2x2": Case({"zero_stage": 3, "zero_shards": 2}),
    "2x2_whole_rank": Case({"zero_stage": 3, "zero_shards": 2, "power_sgd": WHOLE}),
    "2x2_low_rank": Case({"zero_stage": 3, "zero_shards": 2, "power_sgd": LOW}),
    "2x2_everything": Case(
        FP16
        | {
            "zero_stage": 3, "zero_shards": 2, "power_sgd": LOW, "activation_checkpointing": "resblock",
            "accumulate": 2, "optim": OptimConfig(**{**OPTIM.__dict__, "moments": "16-bit", "variance_clip": 5.0}),
        }
    ),
    "2x2_inf": Case(FP16 | {"zero_stage": 3, "zero_shards": 2, "power_sgd": LOW}, inject_inf),
    "2x2_factor_overflow": Case(FP16 | {"zero_stage": 3, "zero_shards": 2, "power_sgd": LOW}, overflow_factor),
}  # fmt: skip


def config_of(case: Case) -> TrainConfig:
    settings = {"zero_stage": 1, "precision": "fp32", "optim": OPTIM} | case.settings
    return TrainConfig(n_steps=STEPS, model=MODEL, data=LoaderConfig(batch=BATCH), **settings)


def batch_of(step: int, rank: int = 0, world_size: int = 1) -> TokenBatch:
    """This rank's part of a random batch, with captions of any length and codes that follow from them."""
    random = torch.Generator().manual_seed(step)
    text = torch.randint(SIZES.text_vocab, (BATCH, MODEL.n_text - 1), generator=random)
    length = torch.randint(1, MODEL.n_text, (BATCH, 1), generator=random)
    codes = torch.randint(SIZES.codebook, (BATCH, SIZES.grid**2), generator=random)
    codes[:, ::2] = text[:, :1] % SIZES.codebook
    text = text.where(torch.arange(MODEL.n_text - 1) < length, PAD)
    part = slice(rank * BATCH // world_size, (rank + 1) * BATCH // world_size)
    keys = [f"{step}-{number}" for number in range(BATCH)]
    return TokenBatch(text[part], codes[part], keys[part])


def run(case: Case, place: Place, folder: Path) -> dict[str, Any]:
    engine = Engine(config_of(case), SIZES, place)
    owners = [resblock_of(names[0], engine._settlement.blocks) for names in engine._shards.group_names]
    updates: list[Update] = []
    moved: list[list[str]] = []
    for step in range(STEPS):
        case.befalls(engine, step)
        before = [master.detach().clone() for master in engine._shards.masters]
        updates.append(engine.step(step, batch_of(step, place.rank, place.world_size)))
        pairs = zip(owners, before, engine._shards.masters, strict=True)
        moved.append(sorted({owner for owner, old, new in pairs if not torch.equal(old, new)}))
    folder.mkdir(exist_ok=True)
    engine.release(folder)
    return {
        "values": [update.values for update in updates],
        "applied": [update.applied for update in updates],
        "left_out": [update.left_out for update in updates],
        "moved": moved,
        "stood_still": [not names for names in moved],
        "weights": load_file(folder / WEIGHTS) if place.is_main else {},
        "bytes": engine._replicas.bytes_sent if engine._replicas else 0,
        "n_weights": sum(len(master) for master in engine._shards.masters),
    }


def main() -> None:
    folder, names = Path(sys.argv[1]), sys.argv[2:]
    torch.set_num_threads(1)
    with joined_place(timeout_minutes=1.0) as place:
        for name in names:
            torch.save(run(CASES[name], place, folder / name), folder / f"{name}.rank{place.rank}.pt")


if __name__ == "__main__":
    main()
