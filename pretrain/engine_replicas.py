"""What crosses between replicas: which gradients are sent as matrices, and how they are put together.

A shard at ZeRO stage 3 is a run of a weight's rows, so it can be compressed as a matrix on its own (Ramesh et al.
2021, appendix E.1). Queries, keys and values lie in one weight; a shard of it is cut into three, and each is of
one kind. The MLP's second weight is stored inputs first, as in table 2 of the paper.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from cluster.power_sgd import Arithmetic, Block, PowerSGD, PowerSGDConfig
from cluster.process import Place, sum_over_ranks
from cluster.replica_mean import Codec
from cluster.topology import Seat
from kernels import low_bit, low_rank
from pretrain.adamw import Factors
from pretrain.engine_shards import Piece
from pretrain.optim import REST

STACKED = {"qkv.weight": 3}  # weights that hold several matrices, one above the other


def power_sgd(config: PowerSGDConfig, seat: Seat, device: torch.device, seed: int) -> PowerSGD:
    """PowerSGD with the arithmetic of kernels/."""
    largest = low_bit.decode(torch.tensor(0x7DFF, dtype=torch.int16), "1-6-9").item()
    codec = Codec(
        torch.int16, largest,
        lambda x: low_bit.encode(x, "1-6-9", "infinity"), lambda codes: low_bit.decode(codes, "1-6-9"),
    )  # fmt: skip
    return PowerSGD(config, seat, Arithmetic(low_rank.orthogonalise_each, {"1-6-9": codec}), device, seed)


def block_of(name: str, pieces: Sequence[Piece]) -> Block:
    """Gradients of a resblock (or REST, of which nothing is compressed), split into matrices and the others."""
    matrices: dict[str, Tensor] = {}
    plain: dict[str, Tensor] = {}
    for piece in pieces:
        size, columns = piece.gradient.numel(), piece.shape[-1]
        stack = next((count for ending, count in STACKED.items() if piece.name.endswith(ending)), 1)
        if name == REST or len(piece.shape) != 2 or not size or size % (columns * stack):
            plain[piece.name] = piece.gradient
            continue
        parts = piece.gradient.view(stack, -1, columns)
        matrices |= {f"{piece.name}/{number}": part for number, part in enumerate(parts)}
    return Block(matrices, plain)


def average(power: PowerSGD, place: Place, blocks: Sequence[Block]) -> float:
    """Bring every gradient together over the replicas: those sent whole become their means, of the others the
    factors are known. Returns the norm of the mean gradient, infinite if a factor was not finite: then, as whenever
    nothing is to be updated, `power.skip` ends the update. Collective over all ranks."""
    for block in blocks:
        power.compress(block)
    decision = power.decide()
    squared = sum_over_ranks(place, {"squared": decision.squared_norm})["squared"]
    return math.sqrt(squared / power.seat.topology.n_replicas)


def factors_of(power: PowerSGD) -> dict[str, list[Factors]]:
    """The mean gradients that are known by their factors: of each parameter the matrices that `block_of` made."""
    found: dict[str, list[Factors]] = {}
    for one in power.factors():  # all of p q^T leaves each replica's error buffer, for q is a mean
        found.setdefault(one.name.rpartition("/")[0], []).append(Factors(one.p, one.q, one.error, 1))
    return found


def errors_path(folder: Path, shard: int) -> Path:
    """The file of a checkpoint in which a shard's error buffers are."""
    return folder / f"zero_pp_rank_{shard}_mp_rank_00_error_states.pt"


def restore_errors(power: PowerSGD, folder: Path, n_shards: int) -> None:
    """Go on from the error buffers of a checkpoint of n_shards shards, on any number of replicas.

    Among another number of shards the matrices are dealt out anew, row by row. A run without compression left none.
    """
    paths = [errors_path(folder, shard) for shard in range(n_shards)]
    if not all(path.is_file() for path in paths):
        return
    size, index = power.seat.topology.shard_size, power.seat.shard_index
    if size == n_shards:
        power.load_state_dict(torch.load(paths[index], weights_only=True))
        return
    states = [torch.load(path, mmap=True, weights_only=True) for path in paths]
    errors: dict[str, Tensor] = {}
    for name in {name.rpartition("/")[0] for state in states for name in state["errors"]}:
        names = sorted(one for one in states[0]["errors"] if one.rpartition("/")[0] == name)
        whole = torch.cat([state["errors"][one] for state in states for one in names])
        if len(whole) % (size * len(names)) == 0:
            parts = whole.chunk(size)[index].chunk(len(names))
            errors |= dict(zip(names, parts, strict=True))
    power.load_state_dict(states[0] | {"errors": errors, "starts": {}})
