"""Seeded inputs of relaxed codes, and all that comes out of them, forward and backward."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels import reference
from kernels import relaxed_codes as door
from tests.kernels.accuracy import assert_accurate


@dataclass(frozen=True)
class Case:
    """Inputs and gradients of the outputs."""

    logits: Tensor
    uniform: Tensor
    d_weights: Tensor
    d_kl: Tensor
    temperature: float


def make(shape: tuple[int, ...], dtype: torch.dtype, temperature: float) -> Case:
    random = torch.Generator().manual_seed(sum(shape))
    numbers = torch.promote_types(dtype, torch.float32)
    return Case(
        logits=(torch.randn(shape, generator=random) * 2 + 3).to(dtype),
        uniform=torch.rand(shape, generator=random, dtype=numbers).clamp_(1e-7, 1 - 1e-7),
        d_weights=torch.randn(shape, generator=random).to(dtype),
        d_kl=torch.randn(shape[:-1], generator=random, dtype=numbers),
        temperature=temperature,
    )


def run(function: Callable[..., tuple[Tensor, Tensor]], case: Case) -> dict[str, Tensor]:
    """Weights, divergence, gradient of the logits."""
    logits = case.logits.detach().requires_grad_()
    weights, kl = function(logits, case.uniform, case.temperature)
    torch.autograd.backward([weights, kl], [case.d_weights, case.d_kl])
    assert logits.grad is not None
    return {"weights": weights.detach(), "kl": kl.detach(), "d_logits": logits.grad}


def in_float32(logits: Tensor, uniform: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """The definition as plain torch would compute it of 16-bit logits: in float32, the weights then cast."""
    weights, kl = reference.relaxed_codes(logits.to(reference.wide(logits)), uniform, temperature)
    return weights.to(logits.dtype), kl


def assert_relaxed_codes(case: Case) -> None:
    """The door against plain torch, both against plain torch in float64. The rounding error of logit + noise
    is divided by the temperature."""
    exact = Case(*(t.double() for t in (case.logits, case.uniform, case.d_weights, case.d_kl)), case.temperature)
    values, plain = run(door.relaxed_codes, case), run(in_float32, case)
    assert_accurate(values, plain, run(reference.relaxed_codes, exact), amplified=max(1 / case.temperature, 1.0))
