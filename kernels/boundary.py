"""The door to the resblock boundary: residual add, layer norm, and the gradient scales of their backward.

Registered as torch operators, so torch.compile and activation checkpointing see operators with known
shapes. What they compute is defined in kernels/reference.py. Scales stay on the device: nothing waits.
"""

import importlib
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import reference
from kernels.operators import gradient_of, operator, shapes_of
from kernels.reference import NORM_EPS, wide

WIDEST = 8_192  # a GPU holds a row of this width in the registers of one block


def leave(x: Tensor, branch: Tensor, scale: Tensor | None = None) -> Tensor:
    """The end of a resblock: x + branch in x's dtype.

    x (..., M) stream, branch (..., M). scale: one float32 number on x's device, by which the gradient of
    the stream is multiplied on its way into the branch, where Inf and NaN become 0; None is 1 and no filter.
    ValueError if the shapes differ.
    """
    _check(x, branch, None)
    return reference.leave(x, branch) if scale is None else _leave(x, branch, scale)


def boundary(
    x: Tensor,
    branch: Tensor | None,
    gain: Tensor,
    bias: Tensor,
    leave_scale: Tensor | None = None,
    enter_scale: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """The end of one resblock and the layer norm of the next: x' = x + branch, h = layer_norm(x') * gain + bias.

    x (..., M) stream, branch (..., M) or None, gain and bias (M) -> x' in x's dtype (x itself if branch is
    None), h in `dtype` (the branch's if not given, x's if there is none). Given gradients dx' and dh, with
    filter(Inf or NaN) = 0 (Ramesh et al. 2021, section 2.4 and figure 4):

        dx      = dx' + filter(layer_norm_gradient(dh) / enter_scale)
        dbranch = filter(dx * leave_scale), cast to branch's dtype
        dgain, dbias as of plain layer norm: unfiltered, and still times enter_scale as dh is

    A scale is one float32 number on x's device; None is 1 and no filter. One bad value of dh makes its whole
    row of the layer norm's gradient NaN, hence 0. ValueError if shapes do not fit.
    """
    _check(x, branch, gain)
    if (
        leave_scale is enter_scale is None
        and x.dtype == gain.dtype == bias.dtype == (dtype or x.dtype)
        and not x.is_cuda
    ):
        x = x if branch is None else x + branch  # torch's own operators lose nothing here
        return x, F.layer_norm(x, gain.shape, gain, bias, NORM_EPS)
    if branch is None and leave_scale is not None:
        raise ValueError("leave_scale is given, but no branch that it could scale")
    dtype = dtype or (x if branch is None else branch).dtype
    if not _is_fused(x) and leave_scale is None and enter_scale is None:
        return reference.boundary(x, branch, gain, bias, dtype=dtype)  # torch's own operators lose nothing here
    total, h, _, _ = _forward(x, branch, gain, bias, leave_scale, enter_scale, dtype)
    return (x if branch is None else total), h


def _check(x: Tensor, branch: Tensor | None, gain: Tensor | None) -> None:
    if branch is not None and branch.shape != x.shape:
        raise ValueError(f"branch is {tuple(branch.shape)}, the stream {tuple(x.shape)}")
    if gain is not None and gain.shape != x.shape[-1:]:
        raise ValueError(f"gain is {tuple(gain.shape)}, the stream {tuple(x.shape)}")


def _is_fused(x: Tensor) -> bool:
    return x.is_cuda and x.dtype != torch.float64 and x.shape[-1] <= WIDEST


def _triton() -> Any:
    """Imported at first use, for a CPU may not have it installed."""
    return importlib.import_module("kernels.boundary_triton")


@operator("leave")
def _leave(x: Tensor, branch: Tensor, scale: Tensor) -> Tensor:
    return (x.contiguous() + branch.contiguous()).to(x.dtype)


@shapes_of("leave")
def _(x: Tensor, branch: Tensor, scale: Tensor) -> Tensor:
    return x.new_empty(x.shape)


@operator("leave_backward")
def _leave_backward(d_total: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """filter(d_total * scale) in `dtype`."""
    if _is_fused(d_total):
        return _triton().leave_backward(d_total.contiguous(), scale, dtype)
    return _scaled(d_total.contiguous(), scale, dtype)


@shapes_of("leave_backward")
def _(d_total: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return d_total.new_empty(d_total.shape, dtype=dtype)


def _remember_leave(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[2])
    ctx.dtype = inputs[1].dtype


def _differentiate_leave(ctx: Any, d_total: Tensor) -> tuple[Tensor, Tensor, None]:
    return d_total, _leave_backward(d_total, *ctx.saved_tensors, ctx.dtype), None


gradient_of("leave", _remember_leave, _differentiate_leave)


@operator("boundary")
def _forward(
    x: Tensor, branch: Tensor | None, gain: Tensor, bias: Tensor,
    leave_scale: Tensor | None, enter_scale: Tensor | None, dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """x' (empty without a branch: an operator may not return what it was given), h, and mean and 1/deviation (...)."""
    x = x.contiguous()
    branch = None if branch is None else branch.contiguous()
    if _is_fused(x):
        return _triton().forward(x, branch, gain, bias, dtype)
    total = x if branch is None else (x + branch).to(x.dtype)
    kind = wide(x)
    h, mean, rstd = torch.native_layer_norm(total.to(kind), gain.shape, gain.to(kind), bias.to(kind), NORM_EPS)
    return x.new_empty(0) if branch is None else total, h.to(dtype), mean.squeeze(-1), rstd.squeeze(-1)


@shapes_of("boundary")
def _(
    x: Tensor, branch: Tensor | None, gain: Tensor, bias: Tensor,
    leave_scale: Tensor | None, enter_scale: Tensor | None, dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    mean, rstd = (x.new_empty(x.shape[:-1], dtype=wide(x)) for _ in range(2))
    return x.new_empty(0 if branch is None else x.shape), x.new_empty(x.shape, dtype=dtype), mean, rstd


@operator("boundary_backward")
def _backward(
    d_total: Tensor | None, d_h: Tensor, total: Tensor, mean: Tensor, rstd: Tensor, gain: Tensor,
    leave_scale: Tensor | None, enter_scale: Tensor | None, branch_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """dx (without d_total only the layer norm's share), dbranch, dgain and dbias (M).

    dbranch is empty if branch_dtype is None: for want of a branch, or because dx serves for it.
    """
    d_total = None if d_total is None else d_total.contiguous()
    d_h, total = d_h.contiguous(), total.contiguous()
    if _is_fused(total):
        return _triton().backward(d_total, d_h, total, mean, rstd, gain, leave_scale, enter_scale, branch_dtype)
    kind = wide(total)
    gain = gain.to(kind)
    d_x, d_gain, d_bias = torch.ops.aten.native_layer_norm_backward(
        d_h.to(kind), total.to(kind), gain.shape, mean[..., None], rstd[..., None], gain, gain, [True] * 3
    )
    if enter_scale is not None:
        d_x.mul_(enter_scale.reciprocal()).nan_to_num_(0.0, 0.0, 0.0)
    if d_total is not None:
        d_x.add_(d_total)
    d_branch = d_x.new_empty(0) if branch_dtype is None else _scaled(d_x, leave_scale, branch_dtype)
    return d_x.to(total.dtype), d_branch, d_gain, d_bias


@shapes_of("boundary_backward")
def _(
    d_total: Tensor | None, d_h: Tensor, total: Tensor, mean: Tensor, rstd: Tensor, gain: Tensor,
    leave_scale: Tensor | None, enter_scale: Tensor | None, branch_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    d_branch = total.new_empty(0 if branch_dtype is None else total.shape, dtype=branch_dtype or wide(total))
    d_gain, d_bias = (total.new_empty(gain.shape, dtype=wide(total)) for _ in range(2))
    return total.new_empty(total.shape), d_branch, d_gain, d_bias


def _scaled(gradient: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """filter(gradient * scale) in `dtype`; the gradient itself if there is nothing to do."""
    if scale is None:
        return gradient.to(dtype)
    return (gradient.to(wide(gradient)) * scale).nan_to_num_(0.0, 0.0, 0.0).to(dtype)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, branch, gain, bias, leave_scale, enter_scale, _ = inputs
    total, _, mean, rstd = output
    ctx.save_for_backward(x if branch is None else total, mean, rstd, gain, leave_scale, enter_scale)
    ctx.has_branch, ctx.bias_dtype = branch is not None, bias.dtype
    # Without a scale, a branch in the stream's dtype has the stream's gradient: no second tensor is written.
    ctx.branch_dtype = None if branch is None or (branch.dtype == x.dtype and leave_scale is None) else branch.dtype
    ctx.mark_non_differentiable(mean, rstd)


def _differentiate(ctx: Any, d_total: Tensor, d_h: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    total, mean, rstd, gain, *scales = ctx.saved_tensors
    stream = d_total if ctx.has_branch else None
    d_x, d_branch, d_gain, d_bias = _backward(stream, d_h, total, mean, rstd, gain, *scales, ctx.branch_dtype)
    into_branch = (d_x if ctx.branch_dtype is None else d_branch) if ctx.has_branch else None
    return d_x, into_branch, d_gain.to(gain.dtype), d_bias.to(ctx.bias_dtype), None, None, None


gradient_of("boundary", _remember, _differentiate)
