"""Gradients and settings that the tests of PowerSGD share."""

import hashlib
from typing import Any

import torch
from torch import Tensor

from cluster.power_sgd import Arithmetic, Block, Decision, PowerSGD, PowerSGDConfig
from cluster.replica_mean import Codec
from cluster.topology import Seat
from kernels.low_bit import decode, encode
from kernels.low_rank import orthogonalise_each

CPU = torch.device("cpu")
SHAPES = {"wide": (12, 40), "tall": (30, 10), "square": (16, 16), "tiny": (4, 4)}
PLAIN = {"gain": (16,), "table": (9, 5)}
# Of the norm, against float64 over 10 updates. From a fixed start differences stay at a few roundings (measured:
# 5e-7); a warm start hands them on to the next update, which enlarges them (measured: 2e-7 at first, then 4e-6).
LIMIT = {"fixed": 3e-6, "warm": 1e-4}
RANK = 3  # of a shard: saves nothing on "tiny", and factors are no multiple of 4 numbers

ARITHMETIC = Arithmetic(
    orthogonalise_each,
    {
        "1-6-9": Codec(
            torch.int16, 15.984375, lambda x: encode(x, "1-6-9", "infinity"), lambda codes: decode(codes, "1-6-9")
        )
    },
)


def power_sgd(seat: Seat, **settings: Any) -> PowerSGD:
    """Compressing from the first update, in float32, unless the settings say otherwise."""
    config = {"rank": RANK * seat.topology.shard_size, "start_step": 0, "errors": "fp32", "wire": "fp32", **settings}
    return PowerSGD(PowerSGDConfig(**config), seat, ARITHMETIC, CPU)


def gradient(shape: tuple[int, ...], *seeds: int | str) -> Tensor:
    """Numbers of about 0.01; a matrix is of rank 3 and a tenth of noise, as far as this seed alone is concerned."""
    digest = hashlib.sha256(repr(seeds).encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:4], "big"))
    noise = torch.randn(shape, generator=generator)
    if len(shape) == 1:
        return 0.01 * noise
    left, right = torch.randn(shape[0], 3, generator=generator), torch.randn(3, shape[1], generator=generator)
    return 0.01 * (left @ right + 0.1 * noise)


def block_of(step: int, rank: int) -> Block:
    """This rank's gradients at a step."""
    return Block(
        {name: gradient(shape, name, step, rank) for name, shape in SHAPES.items()},
        {name: gradient(shape, name, step, rank) for name, shape in PLAIN.items()},
    )


def copies(block: Block) -> dict[str, Tensor]:
    """Its gradients as they are now."""
    return {name: tensor.clone() for name, tensor in (*block.matrices.items(), *block.plain.items())}


def one_update(power: PowerSGD, block: Block) -> Decision:
    """Of one block, whose gradients become the mean."""
    power.compress(block)
    decision = power.decide()
    power.apply()
    return decision
