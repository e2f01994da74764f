"""PowerSGD between replicas: gradients cross the network as two thin factors, and what these miss is not lost.

Each rank compresses its own shards (Ramesh et al. 2021, appendix E.2, after Vogels et al. 2019). E_i is the error
buffer of one matrix on replica i of N, turned so that it has no more rows than columns; T is a transpose:

    E_i += gradient_i
    P = orthonormal columns of mean_i(E_i start), start being Gaussian
    Q = mean_i(E_i^T P)
    G = P Q^T stands for the mean gradient in the update
    E_i -= G

E.2 sums Q where this averages it, so its G is N times larger and it subtracts G / N, which is the same. Either way
sum_i E_i + N (sum of all G so far) is the sum of all gradients: nothing is lost. |G| = |Q|, for P is orthonormal,
and the clip threshold is in units of the mean gradient.

One update is: `compress` for each block, `decide`, then one of `apply`, `factors` + `finish`, or `skip`.
"""

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from cluster.replica_mean import TORCH_CODECS, Codec, ReplicaMean
from cluster.settings import SettingError, setting
from cluster.topology import Seat

Format = Literal["fp32", "bf16", "1-6-9"]

# Updates in a row whose factors overflowed after which error buffers are given up: finite buffers are kept (E.2),
# but what they hold is in the next factors too, so that these would overflow for ever.
MOST_OVERFLOWS = 3


@dataclass(frozen=True)
class PowerSGDConfig:
    """What is compressed, how far, and in which numbers."""

    rank: int = setting(0, "rank of a whole matrix, shared by its shards; 0 sends gradients whole (the paper: 896)")
    start: Literal["fixed", "warm", "fresh"] = setting(
        "fixed", "where the factors start: one Gaussian matrix for ever, the last update's, or a new one each update"
    )
    start_step: int = setting(100, "updates with whole gradients before the first compressed one")
    least_saving: float = setting(1.0, "a matrix is sent whole unless its factors hold this many times fewer numbers")
    errors: Format = setting("fp32", "numbers of the error buffers (the paper: 1-6-9)")
    wire: Format = setting("bf16", "numbers in which factors are sent (the paper: 1-6-9)")
    p_scale: float = setting(1.0, "factor on P while it is sent, to suit the range of the numbers")
    q_scale: float = setting(1.0, "factor on Q while it is sent, to suit the range of the numbers")

    def __post_init__(self) -> None:
        for name in ("rank", "start_step", "least_saving"):
            if getattr(self, name) < 0:
                raise SettingError(f"power_sgd.{name}={getattr(self, name)} must be at least 0")
        for name in ("p_scale", "q_scale"):
            if not 0 < getattr(self, name) < math.inf:
                raise SettingError(f"power_sgd.{name}={getattr(self, name)} must be above 0 and finite")


@dataclass(frozen=True)
class Arithmetic:
    """What the algorithm computes with, handed in by who may import it.

    orthogonalise: matrices (n, r) -> orthonormal columns of each, the same bits for the same input.
    codecs: of the formats that are not torch's own.
    """

    orthogonalise: Callable[[Sequence[Tensor]], list[Tensor]]
    codecs: Mapping[str, Codec] = field(default_factory=dict)


@dataclass(frozen=True)
class Block:
    """Gradients of this rank's shards that are ready together, float32, finite unless said otherwise, unscaled.

    matrices: name -> (rows, columns), whole rows of a weight, contiguous; candidates for compression.
    plain: name -> any shape: gains, biases, embeddings; never compressed.
    """

    matrices: Mapping[str, Tensor]
    plain: Mapping[str, Tensor]
    is_finite: bool = True


@dataclass(frozen=True)
class Decision:
    """What all ranks know once every block is compressed.

    squared_norm: this rank's share of the squared norm of the mean gradient, to be summed over the shard group.
    Infinite if any gradient or factor of any rank was not finite: then the update must be skipped.
    """

    squared_norm: float
    gradients_finite: bool
    factors_finite: bool

    @property
    def is_finite(self) -> bool:
        return self.gradients_finite and self.factors_finite


@dataclass(frozen=True)
class Factors:
    """Mean gradient p @ q.T of one matrix (n, k): p (n, r), q (k, r), and its error buffer (n, k), in its format.

    All contiguous, whatever layout the orthogonalisation leaves.
    Who updates from these must also do error -= p @ q.T, not divided by anything.
    """

    name: str
    p: Tensor
    q: Tensor
    error: Tensor


@dataclass
class _Sent:
    """A compressed matrix between `compress` and the end of the update."""

    name: str
    gradient: Tensor  # the caller's view
    upright: Tensor  # the error buffer in float32, short side first
    start: Tensor  # (long side, r)
    p: Tensor = field(init=False)  # (short side, r), orthonormal
    q: Tensor = field(init=False)  # (long side, r)

    def factors(self) -> tuple[Tensor, Tensor]:
        """(rows, r) and (columns, r) of the gradient as the caller has it."""
        return (self.p, self.q) if _lies(self.gradient) else (self.q, self.p)


def shard_rank(shape: Sequence[int], config: PowerSGDConfig, shard_size: int) -> int:
    """Rank of a shard (n, k) of a matrix cut into shard_size shards, 0 to send it whole.

    Each shard has its part of the rank (fn. 9 of the paper), at least 1 and at most its short side. It is sent
    whole unless least_saving * r (n + k) < n k; least_saving=0 compresses everything.
    """
    n, k = shape
    rank = min(max(config.rank // shard_size, 1), n, k) if config.rank else 0
    return rank if config.least_saving * rank * (n + k) < n * k else 0


def gaussian(length: int, rank: int, *seeds: int | str) -> Tensor:
    """(length, rank) standard normal numbers on the CPU, a function of the seeds alone."""
    digest = hashlib.sha256("/".join(map(str, seeds)).encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big", signed=True))
    return torch.randn(length, rank, generator=generator)


class PowerSGD:
    """Compresses one rank's shards and averages them over its replica group.

    All replicas of a shard must hand in the same names and shapes in the same order. Buffers are made when a
    matrix is first compressed; they cost one number a weight of the shard.
    """

    def __init__(
        self, config: PowerSGDConfig, seat: Seat, arithmetic: Arithmetic, device: torch.device, seed: int = 0
    ) -> None:
        """SettingError if no codec was handed in for a format that the settings name."""
        self.config, self.seat, self.arithmetic, self.device, self.seed = config, seat, arithmetic, device, seed
        self.step = 0
        self._overflows = 0  # updates in a row
        self._mean = ReplicaMean(seat)
        self._errors: dict[str, Tensor] = {}
        self._starts: dict[str, Tensor] = {}
        codecs = {**TORCH_CODECS, **arithmetic.codecs}
        for name, kind in (("errors", config.errors), ("wire", config.wire)):
            if kind not in codecs:
                raise SettingError(f"power_sgd.{name}={kind!r} is not one of {', '.join(codecs)}")
        self._storage, self._wire = codecs[config.errors], codecs[config.wire]
        self._sent: list[_Sent] = []  # in the order of compression
        self._squared_norm = torch.zeros((), dtype=torch.float64, device=device)
        self._overflowed = torch.zeros((), dtype=torch.bool, device=device)
        self._gradients_finite = True
        self._factors_finite = False  # nothing is known before `decide`

    @property
    def bytes_sent(self) -> int:
        """Bytes of gradients and factors handed to all-reduces so far, counted where they are sent."""
        return self._mean.bytes_sent

    def compress(self, block: Block) -> None:
        """Average a block over the replicas. Collective over the replica group: 3 all-reduces or fewer.

        Whole gradients are the mean on return. Those of compressed matrices hold nothing of meaning until
        `apply`. On a GPU everything is queued on the current stream, so that a side stream overlaps it with the
        backward pass of the blocks before.
        """
        self._gradients_finite = self._gradients_finite and block.is_finite
        whole, sent = list(block.plain.values()), []
        for name, gradient in block.matrices.items():
            rank = shard_rank(gradient.shape, self.config, self.seat.topology.shard_size)
            if rank and self.step >= self.config.start_step:
                sent.append(self._absorb(name, gradient, rank, block.is_finite))
            else:
                whole.append(gradient)
        if whole:
            self._average(whole)
        if sent:
            products = self._exchange([one.upright @ one.start for one in sent], self.config.p_scale)
            bases = self.arithmetic.orthogonalise([_at_most_one(product) for product in products])
            others = self._exchange(
                [one.upright.mT @ p for one, p in zip(sent, bases, strict=True)], self.config.q_scale
            )
            for one, p, q in zip(sent, bases, others, strict=True):
                one.p, one.q = p.contiguous(), q
                self._squared_norm += torch.linalg.vector_norm(q).double().square()
        self._sent += sent

    def decide(self) -> Decision:
        """What became of the blocks, the same flags on every rank of the job. Collective over all of them."""
        flags = torch.stack([self._overflowed, ~self._squared_norm.isfinite()]).int()
        flags[1] |= int(not self._gradients_finite)
        if self.seat.topology.world_size > 1:
            dist.all_reduce(flags, dist.ReduceOp.MAX)
        overflowed, not_finite = flags.tolist()
        norm = math.inf if overflowed or not_finite else self._squared_norm.item()
        self._factors_finite = not overflowed
        self._overflows = self._overflows + 1 if overflowed else 0
        return Decision(norm, not not_finite, not overflowed)

    def apply(self) -> None:
        """Write the decompressed mean gradients into the views that `compress` was given, feed back, and finish."""
        for one in self._sent:
            p, q = one.factors()
            self._feed_back(one.name, p, q, out=one.gradient)
        self.finish()

    def factors(self) -> list[Factors]:
        """For a caller that updates weights and error buffers itself, instead of `apply`; call `finish` after it."""
        return [Factors(one.name, *one.factors(), self._errors[one.name]) for one in self._sent]

    def skip(self) -> None:
        """End an update that changed no weights (E.2): its gradients are dropped as those of any skipped update.

        What the factors hold leaves the error buffers; where factors were not finite they cannot be trusted, and
        every buffer stays as it is, or becomes zero if it is not finite itself, or at the MOST_OVERFLOWS-th time
        in a row. Zeroing often harms training.
        """
        gives_up = self._overflows >= MOST_OVERFLOWS
        for one in self._sent:
            error = self._errors[one.name]
            if self._factors_finite:
                self._feed_back(one.name, *one.factors(), out=one.gradient)
            elif gives_up or not bool(self._storage.decode(error).isfinite().all()):
                error.zero_()
        self.finish(keep_starts=True)

    def finish(self, keep_starts: bool = False) -> None:
        """The update is over; drop its factors. keep_starts: do not learn warm starts from them."""
        if self.config.start == "warm" and not keep_starts:
            bases = self.arithmetic.orthogonalise([_at_most_one(one.q) for one in self._sent])
            for one, basis in zip(self._sent, bases, strict=True):
                # Columns as long as Gaussian ones, so that one p_scale suits every kind of start.
                self._starts[one.name] = basis * math.sqrt(len(basis))
        self.step += 1
        self._begin()

    def state_dict(self) -> dict[str, Any]:
        """State to go on from with any number of replicas. Collective over the replica group, between updates.

        Holds the sum of the error buffers over the replicas, for nothing else matters (E.2), in float32 on the
        CPU; only replica 0 keeps it, for only it writes. Every replica's own buffer becomes the mean, as it will
        when the state is loaded, so that the run goes on to the same bits with and without a restart.
        """
        writes = self.seat.replica_index == 0
        errors = {}
        for name, error in self._errors.items():
            total = self._storage.decode(error).clone()
            if self.seat.replica_group is not None:
                dist.all_reduce(total, group=self.seat.replica_group)
            if writes:
                errors[name] = total.cpu()
            error.copy_(self._share(total))
        starts = {name: start.cpu() for name, start in self._starts.items()} if self.config.start == "warm" else {}
        counts = {"step": self.step, "overflows": self._overflows}
        return counts | {"errors": errors, "starts": starts if writes else {}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replica 0's `state_dict`, on every replica of the same shard; another number of replicas is fine."""
        self.step, self._overflows = int(state["step"]), int(state["overflows"])
        self._errors = {name: self._share(total.to(self.device)) for name, total in state["errors"].items()}
        self._starts = {name: start.to(self.device) for name, start in state["starts"].items()}
        self._begin()

    def _begin(self) -> None:
        """Forget the update before."""
        self._sent = []
        self._squared_norm.zero_()
        self._overflowed.zero_()
        self._gradients_finite, self._factors_finite = True, False

    def _absorb(self, name: str, gradient: Tensor, rank: int, is_finite: bool) -> _Sent:
        """Add a gradient to its error buffer, unless it is not finite."""
        if name not in self._errors:
            self._errors[name] = torch.zeros_like(gradient, dtype=self._storage.dtype)
        error = self._errors[name]
        if error.shape != gradient.shape:
            raise ValueError(
                f"the error buffer of {name} is {tuple(error.shape)}, its gradient {tuple(gradient.shape)}: "
                "the state was saved with another number of shards"
            )
        if self._storage.dtype == torch.float32:
            wide = error.add_(gradient) if is_finite else error
        else:  # the gradient's memory is free once it is added: it holds the buffer's numbers in float32
            if is_finite:
                error.copy_(self._storage.encode(gradient.add_(self._storage.decode(error))))
            wide = gradient.copy_(self._storage.decode(error))
        upright = wide if _lies(gradient) else wide.mT
        return _Sent(name, gradient, upright, self._start(name, upright.shape[1], rank))

    def _start(self, name: str, length: int, rank: int) -> Tensor:
        seeds = (self.seed, self.seat.shard_index, name)
        if self.config.start == "fresh":
            return gaussian(length, rank, *seeds, self.step).to(self.device)
        if name not in self._starts or self._starts[name].shape != (length, rank):
            self._starts[name] = gaussian(length, rank, *seeds).to(self.device)
        return self._starts[name]

    def _feed_back(self, name: str, p: Tensor, q: Tensor, out: Tensor) -> None:
        """out = p q', and take it from the error buffer."""
        torch.mm(p, q.mT, out=out)
        error = self._errors[name]
        if self._storage.dtype == torch.float32:
            error.sub_(out)
        else:
            error.copy_(self._storage.encode(self._storage.decode(error) - out))

    def _share(self, total: Tensor) -> Tensor:
        """A replica's part of the sum of all error buffers, as it is stored."""
        return self._storage.encode(total / self.seat.topology.n_replicas)

    def _average(self, gradients: list[Tensor]) -> None:
        """Each becomes its mean over the replicas, in one float32 all-reduce."""
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
        self._mean.take(flat)
        self._squared_norm += torch.linalg.vector_norm(flat).double().square()
        for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(mean.view(gradient.shape))

    def _exchange(self, factors: list[Tensor], scale: float) -> list[Tensor]:
        """Means of factors over the replicas, sent together in the wire's format; what it cannot hold is clamped."""
        flat = torch.cat([factor.reshape(-1) for factor in factors]).mul_(scale)
        largest = self._wire.largest
        self._overflowed |= ~(flat.abs().amax() <= largest)  # before clamping hides it; NaN is not below anything
        flat.nan_to_num_(nan=0.0).clamp_(-largest, largest)
        flat = self._mean.take_encoded(flat, self._wire)
        means = flat.div_(scale).split([factor.numel() for factor in factors])
        return [mean.view(factor.shape) for mean, factor in zip(means, factors, strict=True)]


def _lies(matrix: Tensor) -> bool:
    """Not more rows than columns: columns of P are as short as they can be without a transpose."""
    return matrix.shape[0] <= matrix.shape[1]


def _at_most_one(matrix: Tensor) -> Tensor:
    """Divided by its largest number, so that the epsilon of orthogonalisation means the same at any gradient scale."""
    largest = matrix.abs().amax()
    return matrix / torch.where(largest > 0, largest, 1.0)
