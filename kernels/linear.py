"""Linear layers, plain and behind the activation, by the fastest products that the processor has.

Torch's own, but on AMD processors in float32 those of oneDNN: there torch takes MKL, which runs other
makers' processors at half their speed or less (94 against 217 GFLOP/s on a core of an EPYC with
AVX-512, measured, with equal errors).

Where x is narrower than the weights (float16 in a branch whose weights are kept in float32), products
are in x's dtype with float32 sums, the weights' gradient too, but the bias's gradient is summed and
kept in float32 (Ramesh et al. 2021, appendix D: gains and biases have 32-bit gradients). The narrow
copy of a weight lives no longer than a product.
"""

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

FEW_ROWS = 8  # what oneDNN's blocks are laid out for
SLOPE = 1.702  # Child et al. 2019 (arXiv 1904.10509), section 5


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x @ weight^T + bias: x (..., n), weight (m, n), bias (m) -> (..., m)."""
    if x.dtype == weight.dtype and not _by_onednn(x, weight):
        return F.linear(x, weight, bias)
    return _Linear.apply(x, weight, bias) if torch.is_grad_enabled() else _linear(x, weight, bias)


def activated_linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """(x * sigmoid(1.702 x)) @ weight^T + bias: x (..., n), weight (m, n), bias (m) -> (..., m).

    The weight may be a transpose, as one stored inputs first is.

    Keeps 1.702 x for the backward pass and not the activation's output, which in an MLP is four times as wide
    as the model: the largest saving that needs no second product.
    """
    if torch.is_grad_enabled():
        return _ActivatedLinear.apply(x, weight, bias)
    return _linear(_activated(x * SLOPE), weight, bias)


def packed(weight: Tensor) -> Tensor:
    """weight (m, n) as `linear` without a gradient reads it fastest when x has few rows, as in drawing.

    On an AMD processor oneDNN's own blocks (twice as fast for 8 rows, measured), else inputs first
    (1.2 to 1.4 times); on a GPU as it is.
    """
    weight = weight.detach()
    if weight.device.type != "cpu":
        return weight
    if _by_onednn(weight, weight):
        return torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), FEW_ROWS)
    return weight.t().contiguous().t()


def _by_onednn(a: Tensor, b: Tensor) -> bool:
    if torch.compiler.is_compiling():  # the compiler makes its own choice
        return False
    return a.dtype == b.dtype == torch.float32 and a.device.type == "cpu" and _mkl_is_slow()


@cache
def _mkl_is_slow() -> bool:
    return torch.backends.mkldnn.is_available() and "AMD" in str(torch.cpu.get_capabilities().get("cpu_name"))


def _product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """a @ b^T + bias: a (r, n), b (m, n), bias (m) -> (r, m)."""
    if a.dtype == torch.float16 and a.device.type == "cpu":  # few processors have it: torch takes 4 times as long
        return _product(a.float(), b.float(), None if bias is None else bias.float()).half()
    if _by_onednn(a, b):
        return torch.ops.mkldnn._linear_pointwise(a, b, bias, "none", [], "")
    return F.linear(a, b, bias)


def _linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return _product(_rows(x), weight.to(x.dtype), bias.to(x.dtype)).view(*x.shape[:-1], -1)


def _rows(x: Tensor) -> Tensor:
    """(..., n) as (rows, n)."""
    return x.reshape(-1, x.shape[-1])


def _activated(steep: Tensor) -> Tensor:
    """x * sigmoid(1.702 x) of steep = 1.702 x, by way of torch's silu."""
    return torch.ops.aten.silu(steep).mul_(1 / SLOPE)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        d_out = _rows(d_out)
        d_x = _product(d_out, weight.to(x.dtype).t()).view_as(x) if ctx.needs_input_grad[0] else None
        d_weight = _product(d_out.t(), _rows(x).t())
        return d_x, d_weight.to(weight.dtype), d_out.sum(0, dtype=weight.dtype)


class _ActivatedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        steep = x * SLOPE
        ctx.save_for_backward(steep, weight)
        return _linear(_activated(steep), weight, bias)

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        steep, weight = ctx.saved_tensors
        d_out, rows = _rows(d_out), _rows(steep)
        d_weight = _product(d_out.t(), torch.ops.aten.silu(rows).t()).mul_(1 / SLOPE)
        d_active = _product(d_out, weight.to(steep.dtype).t())
        d_x = torch.ops.aten.silu_backward(d_active, rows)  # its slope and 1 / SLOPE cancel
        return d_x.view_as(steep), d_weight.to(weight.dtype), d_out.sum(0, dtype=weight.dtype)
