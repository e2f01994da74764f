"""Seeded inputs of the resblock boundary, and all that comes out of it, forward and backward."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tests.kernels.accuracy import assert_accurate

NAMES = ("x", "branch", "gain", "bias", "d_total", "d_h")


@dataclass(frozen=True)
class Case:
    """Inputs, gradients of the outputs, and scales."""

    x: Tensor
    branch: Tensor | None
    gain: Tensor
    bias: Tensor
    d_total: Tensor
    d_h: Tensor
    leave_scale: Tensor | None = None
    enter_scale: Tensor | None = None

    def double(self) -> "Case":
        return replace(self, **{name: tensor.double() for name, tensor in vars(self).items() if tensor is not None})


def make(
    shape: tuple[int, ...], stream: torch.dtype, half: torch.dtype, scaled: bool = True, has_branch: bool = True
) -> Case:
    """A stream with a mean and a spread of its own; d_h in units of the enter scale, as in training."""
    random = torch.Generator().manual_seed(sum(shape))
    enter, leave = torch.tensor([700.3, 2.0**9], dtype=torch.promote_types(stream, torch.float32))

    def draw(size: tuple[int, ...], dtype: torch.dtype, spread: float, mean: float = 0.0) -> Tensor:
        return (torch.randn(size, generator=random, dtype=torch.float64) * spread + mean).to(dtype)

    return Case(
        x=draw(shape, stream, 2.0, 0.5),
        branch=draw(shape, half, 1.0) if has_branch else None,
        gain=draw(shape[-1:], torch.promote_types(stream, torch.float32), 0.3, 1.0),
        bias=draw(shape[-1:], torch.promote_types(stream, torch.float32), 0.3),
        d_total=draw(shape, stream, 1.0),
        d_h=draw(shape, half, float(enter) if scaled else 1.0),
        leave_scale=leave if scaled and has_branch else None,
        enter_scale=enter if scaled else None,
    )


def turned(case: Case) -> Case:
    """The same numbers with the first two axes the other way round in memory."""
    names = [name for name in ("x", "branch", "d_total", "d_h") if getattr(case, name) is not None]
    return replace(case, **{name: getattr(case, name).transpose(0, 1).contiguous().transpose(0, 1) for name in names})


def run(boundary: Callable[..., tuple[Tensor, Tensor]], case: Case) -> dict[str, Tensor]:
    """x', h, and the gradients of x, branch, gain and bias."""
    leaves: dict[str, Any] = {name: tensor for name in NAMES[:4] if (tensor := getattr(case, name)) is not None}
    leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in leaves.items()}
    inputs = [leaves.get(name) for name in NAMES[:4]]
    total, h = boundary(*inputs, case.leave_scale, case.enter_scale, dtype=case.d_h.dtype)
    torch.autograd.backward([total, h], [case.d_total, case.d_h])
    gradients = {"d_" + name: leaf.grad for name, leaf in leaves.items()}
    return {"total": total.detach(), "h": h.detach()} | gradients


def assert_boundary(
    fast: Callable[..., tuple[Tensor, Tensor]], plain: Callable[..., tuple[Tensor, Tensor]], case: Case
) -> None:
    """Fast against plain, both against plain in float64."""
    exact = run(plain, case.double())
    # What follows from a rounded x' can be no nearer than its rounding; a 16-bit stream rounds it.
    assert_accurate(run(fast, case), run(plain, case), exact, inputs=case.x.dtype)
