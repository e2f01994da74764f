"""What PowerSGD's own arithmetic costs beside a training step, and how orthonormal its bases are; on one thread."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.distributed_jobs import Row
from kernels.low_rank import orthogonalise, orthogonalise_each

# Ramesh et al. 2021, table 1, section 2.5 and B.2: the 12 billion parameter model, rank 896 over 8 shards, and a
# batch of 1024 pictures on 1024 GPUs.
WIDTH, SHARDS, RANK = 3968, 8, 896 // 8
SLOTS = 256 + 1024  # of the one picture of a GPU
ATTENTION = 1.0107  # scores of row layers add this to a layer's matrix products at this width
PASSES = 4  # forward, forward again under checkpointing, backward twice
BLOCK_ROWS = 1024  # of the product that tells the machine's rate


def best_seconds(work: Callable[[], object], rounds: int = 4) -> float:
    """CPU seconds of the best round: others share the cores."""
    work()
    seconds = []
    for _ in range(rounds):
        start = time.process_time()
        work()
        seconds.append(time.process_time() - start)
    return min(seconds)


@dataclass(frozen=True)
class Cost:
    """Of one layer's matrices on one GPU: floating-point operations, and CPU seconds."""

    flops: float
    seconds: float


def compression_cost() -> Cost:
    """Both products with the error buffers, orthogonalisation, and decompression, of a layer's shards (table 2)."""
    d, m, r = WIDTH, SHARDS, RANK
    shapes = {(d // m, d): 4, (4 * d // m, d): 2}  # short side, long side
    flops = seconds = 0.0
    bases: list[Tensor] = []
    for (short, long), count in shapes.items():
        short, long = min(short, long), max(short, long)
        upright, start = torch.randn(short, long), torch.randn(long, r)
        p = upright @ start
        q, out = upright.mT @ p, torch.empty(short, long)
        works: tuple[Callable[[], object], ...] = (
            lambda u=upright, s=start: u @ s,  # type: ignore[misc]
            lambda u=upright, p=p: u.mT @ p,  # type: ignore[misc]
            lambda p=p, q=q, out=out: torch.mm(p, q.mT, out=out),  # type: ignore[misc]
        )
        seconds += count * sum(best_seconds(work) for work in works)
        flops += count * (3 * 2 * short * long * r + 4 * short * r**2 - 4 / 3 * r**3)
        bases += [p] * count
    return Cost(flops, seconds + best_seconds(lambda: orthogonalise_each(bases)))


def share_row() -> Row:
    """PowerSGD's arithmetic as a share of a step at 12 B: of its operations, and of its time at this machine's rate.

    A GPU takes its picture through whole layers and compresses its own shard of each. MKL computes both here.
    """
    a, b = torch.randn(BLOCK_ROWS, WIDTH), torch.randn(WIDTH, WIDTH)
    rate = 2 * BLOCK_ROWS * WIDTH**2 / best_seconds(lambda: a @ b)
    cost = compression_cost()
    step = SLOTS * 2 * 12 * WIDTH**2 * PASSES * ATTENTION
    share = cost.seconds / (step / rate)
    note = (
        f"1 picture a GPU: {share:.2%} of time, {cost.flops / step:.2%} of operations; "
        f"compression at {cost.flops / cost.seconds / 1e9:.0f} GFLOP/s, large products at {rate / 1e9:.0f}"
    )
    return Row("power_sgd/share", share, 0.05, False, note)


def gram_schmidt(matrix: Tensor, modified: bool) -> Tensor:
    """What the paper turned away (E.2). modified: subtract each basis vector from what is left, not from the column."""
    columns: list[Tensor] = []
    for column in matrix.unbind(1):
        left = column
        if modified:
            for unit in columns:
                left = left - unit * (unit @ left)
        elif columns:
            units = torch.stack(columns, 1)
            left = column - units @ (units.mT @ column)
        columns.append(left / left.norm())
    return torch.stack(columns, 1)


def conditioned(n: int, r: int, condition: float, seed: int) -> Tensor:
    """(n, r) float32 with singular values from 1 down to 1 / condition, in equal ratios."""
    random = torch.Generator().manual_seed(seed)
    left, _ = torch.linalg.qr(torch.randn(n, r, generator=random, dtype=torch.float64))
    right, _ = torch.linalg.qr(torch.randn(r, r, generator=random, dtype=torch.float64))
    values = torch.logspace(0, -torch.tensor(condition, dtype=torch.float64).log10().item(), r, dtype=torch.float64)
    return (left * values @ right.mT).float()


def distance(basis: Tensor) -> float:
    """Largest element of |Q' Q - I|, in float64."""
    wide = basis.double()
    return (wide.mT @ wide - torch.eye(basis.shape[1], dtype=torch.float64)).abs().max().item()


def orthogonality(condition: float) -> dict[str, float]:
    """The worst distance over some matrices of the 12 B model's shape, by method; epsilon as in training."""
    methods: dict[str, Callable[[Tensor], Tensor]] = {
        "Householder": lambda x: orthogonalise(x, method="householder"),
        "guarded CholeskyQR2": lambda x: orthogonalise(x, method="cholesky"),
        "modified Gram-Schmidt": lambda x: gram_schmidt(x, modified=True),
        "classical Gram-Schmidt": lambda x: gram_schmidt(x, modified=False),
    }
    matrices = [conditioned(WIDTH // SHARDS, RANK, condition, seed) for seed in range(3)]
    return {name: max(distance(method(matrix)) for matrix in matrices) for name, method in methods.items()}


def householder_row() -> Row:
    by_condition = {f"1e{power}": orthogonality(10.0**power) for power in (2, 4, 6, 8)}
    asked = by_condition["1e6"]
    note = "at condition 1e6: " + ", ".join(f"{name} {error:.1e}" for name, error in asked.items())
    return Row("householder", asked["Householder"], 1e-5, False, note, by_condition)
