"""Numbers that try 16-bit formats, seeded states of Adam, and what must hold of every version of an update."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kernels import low_bit_reference as reference
from kernels.low_bit_reference import BITS, AdamStep, Format

FORMATS: tuple[Format, ...] = ("1-6-9", "0-6-10")
CODES = torch.arange(-(2**15), 2**15).to(torch.int16)
STEPS = [
    AdamStep(1e-3, 0.9, 0.96, 1e-8, 0.045, step=1),
    AdamStep(1e-3, 0.9, 0.96, 1e-8, 0.0, step=7, variance_clip=5.0, grad_factor=0.3),
    AdamStep(1e-3, 0.8, 0.99, 1e-6, 0.1, step=40, grad_factor=0.3),
]
KINDS = [  # of the mean, the variance and the error buffer
    (torch.int16, torch.int16, torch.int16),
    (torch.bfloat16, torch.bfloat16, torch.bfloat16),
    (torch.float32, torch.float32, torch.float32),
    (torch.int16, torch.float32, torch.bfloat16),
]


def finite_values(format: Format) -> Tensor:
    """All finite values of a format that are not negative, float64, in their order: the code is the index."""
    return reference.decode(torch.arange(BITS[format].infinity).to(torch.int32).to(torch.int16), format).double()


def trying_numbers(format: Format) -> Tensor:
    """float32: every value and midpoint, what is next to them, random bit patterns, a dense sweep, the odd ones."""
    values = finite_values(format)
    middles = (values[1:] + values[:-1]) / 2
    near = torch.cat([values, middles]).float()
    near = torch.cat([near, near.nextafter(torch.tensor(torch.inf)), near.nextafter(torch.tensor(-torch.inf))])
    random = torch.Generator().manual_seed(0)
    patterns = torch.randint(-(2**31), 2**31, (100_000,), generator=random).to(torch.int32).view(torch.float32)
    odd = torch.tensor([0.0, torch.inf, torch.nan, 1e-45, 2.0**-126, 15.9999, 16.0, 3e38, 0.5, 5.0])
    positive = torch.cat([near, torch.linspace(0, 17, 50_000), odd])
    return torch.cat([positive, -positive, patterns])


@dataclass(frozen=True)
class Case:
    """A gradient, also as factors, weights, and moments and an error buffer as they are stored."""

    p: Tensor
    q: Tensor
    g: Tensor
    w: Tensor
    m: Tensor
    v: Tensor
    error: Tensor


def make(n: int, k: int, rank: int, kinds: tuple[torch.dtype, torch.dtype, torch.dtype]) -> Case:
    """(n, k) numbers; the rows of the gradient go from 1e-12 to 1e2, and a tenth of the moments is still 0.

    Nothing that is summed cancels, for then a rounding error may be any multiple of the result.
    """
    random = torch.Generator().manual_seed(n * k + rank)

    def draw(*shape: int) -> Tensor:
        return torch.rand(shape, generator=random) + 0.1

    def signs(size: int) -> Tensor:
        return torch.randint(0, 2, (size, 1), generator=random) * 2.0 - 1

    p, q = draw(n, rank) * torch.logspace(-12, 2, n)[:, None] * signs(n), draw(k, rank) * signs(k)
    g = p @ q.T
    fresh = torch.rand(n, k, generator=random) < 0.1
    m = (draw(n, k) * g).masked_fill(fresh, 0.0)
    v = (draw(n, k) * g * g).masked_fill(fresh, 0.0)
    error = -draw(n, k) * g
    stored = [torch.empty(n, k, dtype=kind) for kind in kinds]
    for buffer, values, format in zip(stored, (m, v, error), ("1-6-9", "0-6-10", "1-6-9"), strict=True):
        reference.write(buffer, values, format)
    return Case(p, q, g, torch.randn(n, k, generator=random), *stored)


def after(update: Callable[..., None], case: Case, *arguments: Any, exact: bool = False) -> Case:
    """What an update makes of a copy of the case; exact: with float64 weights, so of float64 arithmetic."""
    copy = replace(case, **{name: tensor.clone() for name, tensor in vars(case).items()})
    if exact:
        copy = replace(copy, w=copy.w.double())
    if update.__name__ == "adam_update":
        update(copy.w, copy.g, copy.m, copy.v, *arguments)
    else:
        n_replicas, how = arguments
        update(copy.p, copy.q, copy.error, n_replicas, copy.w, copy.m, copy.v, how)
    return copy


def assert_same_update(got: Case, exact: Case, before: Case, how: AdamStep) -> None:
    """Weights to float32's rounding; buffers to theirs, and hardly ever to another side of a tie.

    What a weight is multiplied by is rounded, so is the product, and so the difference to the step: 2^-24 each.
    The step itself carries about ten roundings: of a product P Q^T, of the moments, of a root.
    """
    step = (exact.w - how.decay * before.w.double()).abs()
    assert ((got.w - exact.w).abs() <= 3 * 2.0**-24 * exact.w.abs().maximum(before.w.abs()) + 1e-6 * step).all()
    assert_same_buffer(got.m, exact.m, "1-6-9")
    assert_same_buffer(got.v, exact.v, "0-6-10")
    assert_same_buffer(got.error, exact.error, "1-6-9")


def assert_same_buffer(got: Tensor, exact: Tensor, format: Format) -> None:
    assert got.dtype == exact.dtype
    if got.dtype == torch.int16:
        a, b, spacing, least = *(reference.decode(codes, format) for codes in (got, exact)), 2.0**-9, 2.0**-67
    else:
        a, b, spacing, least = got.float(), exact.float(), torch.finfo(got.dtype).eps, 1e-38
    assert torch.equal(a.isnan(), b.isnan())
    a, b = a.nan_to_num(), b.nan_to_num()
    if got.dtype == torch.float32:
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-30)  # about ten roundings of 2^-24
        return
    assert ((a - b).abs() <= spacing * b.abs() + least).all()  # a neighbour at most ...
    assert (a != b).float().mean() < 0.02  # ... and that where float32's rounding meets a tie of a coarser format
