"""What crosses between replicas: which gradients are sent as matrices, and how they are put together.

A shard at ZeRO stage 3 is a run of a weight's rows, so it can be compressed as a matrix on its own (Ramesh et al.
2021, appendix E.1). Queries, keys and values lie in one weight; a shard of it is cut into three, and each is of
one kind. The MLP's second weight is stored inputs first, as in table 2 of the paper.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
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


class Replicas:
    """Averages gradients between replicas, a resblock as soon as the backward pass has made all of it.

    On a GPU on a stream of its own, beside the rest of the backward pass (Ramesh et al. 2021, E.2: steps 3 to 8 of
    one block run during step 2 of the next).
    """

    def __init__(
        self, power: PowerSGD, place: Place, resblocks: Mapping[str, str], divisors: Mapping[str, Tensor]
    ) -> None:
        """resblocks: of each parameter, by name; divisors: the gradient scale of each resblock that has one."""
        self.power, self._place, self._resblocks, self._divisors = power, place, resblocks, divisors
        self._stream = torch.cuda.Stream(place.device) if place.device.type == "cuda" else None
        self._sizes = Counter(resblocks.values())
        self._begin()

    def meet(self, pieces: list[Piece]) -> None:
        """Gradients are complete within the node; what that completes is unscaled and sent. Collective, at last."""
        for piece in pieces:
            block = self._resblocks[piece.name]
            waiting = self._waiting.setdefault(block, [])
            waiting.append(piece)
            if len(waiting) == self._sizes[block]:
                self._send(block, waiting)

    def squared_norms(self, pieces: list[Piece]) -> dict[str, float]:
        """After the backward pass: of each resblock's gradients on this rank before averaging, still scaled. pieces:
        all there are, of which those that were not met yet are."""
        met = {piece.name for block in self._waiting.values() for piece in block}
        self.meet([piece for piece in pieces if piece.name not in met])
        if self._stream is not None:
            torch.cuda.current_stream(self._place.device).wait_stream(self._stream)
        return dict(zip(self._squares, torch.stack(list(self._squares.values())).tolist(), strict=True))

    def norm(self) -> float:
        """The global norm of the mean gradient; infinite if a factor or a gradient was not finite. Collective."""
        decision = self.power.decide()
        squared = sum_over_ranks(self._place, {"squared": decision.squared_norm})["squared"]
        return math.sqrt(squared / self.power.seat.topology.n_replicas)

    def finish(self, applied: bool) -> None:
        """The update is over; if it was not applied its gradients are dropped. `norm` went before."""
        if applied:
            self.power.finish()
        else:
            self.power.skip()
        self._begin()

    def _begin(self) -> None:
        self._waiting: dict[str, list[Piece]] = {}
        self._squares: dict[str, Tensor] = {}

    def _send(self, block: str, pieces: list[Piece]) -> None:
        order = sorted(pieces, key=lambda piece: piece.name)  # whatever buckets they came in
        if self._stream is None:
            self._compress(block, order)
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._place.device))
        with torch.cuda.stream(self._stream):
            self._compress(block, order)

    def _compress(self, block: str, pieces: list[Piece]) -> None:
        """A resblock with a gradient that is not finite adds nothing to the error buffers."""
        gradients = [piece.gradient for piece in pieces]
        norms = torch.stack(torch._foreach_norm(gradients, dtype=torch.float32))
        self._squares[block] = norms.double().square().sum()
        is_finite = self._squares[block].isfinite()
        factor = 1 / self._divisors[block] if block in self._divisors else torch.ones_like(norms[0])
        for gradient in gradients:
            gradient.copy_(torch.where(is_finite, gradient * factor, 0.0))
        self.power.compress(block_of(block, pieces))


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
