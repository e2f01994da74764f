"""The door to attention under a sparsity pattern: one differentiable operator, whatever computes it.

Registered as torch operators, so torch.compile and activation checkpointing see one operator with
known shapes. Queries, keys and values stay packed as one projection makes them: nothing is copied.
"""

import importlib
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor

from kernels import attention_cpu
from kernels.layout import Layout, Pattern, Sparsity
from kernels.operators import gradient_of, operator, shapes_of
from kernels.reference import masked_attention, wide

How = Literal["auto", "triton", "cpu", "dense"]
DEVICE_KERNELS: dict[str, How] = {"cuda": "triton", "cpu": "cpu"}
SMALL = 128  # slots below which one product under a mask beats a CPU's pieces (measured: 1.2 times at 80)


def attention(qkv: Tensor, sparsity: Sparsity, how: How = "auto") -> Tensor:
    """softmax(q k^T / sqrt(D)) v over the keys that `sparsity` allows.

    qkv (B, S, 3, H, D) with queries, keys and values side by side -> (B, S, H, D), same dtype.
    how: `triton` needs a GPU, `cpu` a CPU, `dense` computes all S x S scores of a mask; `auto` takes the
    fastest that the device of qkv has. ValueError if S is not the layout's or `how` does not fit the device.
    """
    if qkv.shape[1] != sparsity.layout.n_slots:
        raise ValueError(f"qkv has {qkv.shape[1]} slots, the layout {sparsity.layout.n_slots}")
    if how == "auto":
        small = qkv.device.type == "cpu" and qkv.shape[1] < SMALL
        how = "dense" if small else DEVICE_KERNELS.get(qkv.device.type, "dense")
    if how == "dense":
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        return masked_attention(q, k, v, _mask(sparsity, qkv.device)).transpose(1, 2)
    if how == "cpu" and qkv.device.type != "cpu":
        raise ValueError(f"attention=cpu does not run on {qkv.device.type}; attention=auto does")
    shape = sparsity.layout
    words = (sparsity.pattern, shape.n_text, shape.rows, shape.columns, sparsity.kernel, sparsity.half_window)
    return _forward(qkv, how, *words)[0]


@cache
def _mask(sparsity: Sparsity, device: torch.device) -> Tensor:
    return sparsity.mask().to(device)


@operator("attention")
def _forward(
    qkv: Tensor, how: str, pattern: str, n_text: int, rows: int, columns: int, kernel: int, half_window: bool
) -> tuple[Tensor, Tensor]:
    """(B, S, H, D) output and (B, H, S) float32 (or 64) log-sum-exp of the scores (its base is the kernel's own)."""
    sparsity = _sparsity(pattern, n_text, rows, columns, kernel, half_window)
    return _kernels(how).forward(_side_by_side(qkv), sparsity)


@shapes_of("attention")
def _(qkv: Tensor, how: str, *words: Any) -> tuple[Tensor, Tensor]:
    b, s, _, h, d = qkv.shape
    return qkv.new_empty(b, s, h, d), qkv.new_empty(b, h, s, dtype=wide(qkv))


@operator("attention_backward")
def _backward(
    d_out: Tensor, qkv: Tensor, out: Tensor, lse: Tensor,
    how: str, pattern: str, n_text: int, rows: int, columns: int, kernel: int, half_window: bool,
) -> Tensor:  # fmt: skip
    """(B, S, 3, H, D) gradient of qkv."""
    sparsity = _sparsity(pattern, n_text, rows, columns, kernel, half_window)
    return _kernels(how).backward(_side_by_side(d_out), _side_by_side(qkv), out, lse, sparsity)


@shapes_of("attention_backward")
def _(d_out: Tensor, qkv: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(qkv, memory_format=torch.contiguous_format)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    qkv, *ctx.words = inputs
    ctx.save_for_backward(qkv, *output)
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx: Any, d_out: Tensor, _: Tensor) -> tuple[Any, ...]:
    qkv, out, lse = ctx.saved_tensors
    d_qkv = _backward(d_out, qkv, out, lse, *ctx.words)
    return d_qkv, *[None] * len(ctx.words)


gradient_of("attention", _remember, _differentiate)


def _side_by_side(tensor: Tensor) -> Tensor:
    """The tensor, or a copy whose features are neighbours, as the kernels take them for granted: the gradient of a
    sum has one number for all."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


@cache
def _sparsity(pattern: Pattern, n_text: int, rows: int, columns: int, kernel: int, half_window: bool) -> Sparsity:
    return Sparsity(pattern, Layout(n_text, rows, columns), kernel, half_window)


def _kernels(how: str) -> Any:
    """The module that computes; Triton's is imported at first use, for a CPU may not have it installed."""
    return attention_cpu if how == "cpu" else importlib.import_module("kernels.attention_triton")
