"""The door to relaxed codes: Gumbel-softmax weights and their divergence, in one pass each way.

Registered as torch operators, so torch.compile and activation checkpointing see one operator with known
shapes. The definition is in kernels/reference.py. On a CPU, rows are taken in pieces that stay in its
cache, so that many operators make one pass over memory.
"""

import importlib
import math
from typing import Any

import torch
from torch import Tensor

from kernels import reference
from kernels.operators import gradient_of, operator, shapes_of

WIDEST = 8_192  # codebook of the paper; a GPU holds a row of this many logits in one block's registers
PIECE = 2**17  # numbers in a piece of rows: 2 float32 buffers of it fill 1 MiB, a core's second-level cache


def relaxed_codes(logits: Tensor, uniform: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """softmax((logits + Gumbel noise) / temperature), and KL(softmax(logits) || uniform over K) in nats.

    logits (..., K), uniform (..., K) in (0, 1): the noise, which gets no gradient -> weights (..., K) in
    logits' dtype, contiguous, and divergence (...) in float32 (float64 of float64). ValueError if the shapes
    differ. Ramesh et al. 2021, section 2.1; Jang et al. 2016 for the relaxation.
    """
    if logits.shape != uniform.shape:
        raise ValueError(f"logits are {tuple(logits.shape)}, uniform {tuple(uniform.shape)}")
    if not (logits.device.type == "cpu" or _is_fused(logits)):
        weights, kl = reference.relaxed_codes(logits.to(reference.wide(logits)), uniform, temperature)
        return weights.to(logits.dtype), kl
    return _forward(logits, uniform, temperature)[:2]


def _is_fused(logits: Tensor) -> bool:
    return logits.is_cuda and logits.dtype != torch.float64 and logits.shape[-1] <= WIDEST


def _triton() -> Any:
    """Imported at first use, for a CPU may not have it installed."""
    return importlib.import_module("kernels.relaxed_codes_triton")


@operator("relaxed_codes")
def _forward(logits: Tensor, uniform: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Weights and divergence; and for the backward log sum_k exp(logit_k) and sum_k p_k logit_k, each (...)."""
    rows, noise = _rows(logits), _rows(uniform)
    forward = _triton().forward if _is_fused(logits) else _forward_in_pieces
    weights, *numbers = forward(rows, noise, temperature)
    kl, lse, mean = (number.view(logits.shape[:-1]) for number in numbers)
    return weights.view(logits.shape), kl, lse, mean


@shapes_of("relaxed_codes")
def _(logits: Tensor, uniform: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    kl, lse, mean = (logits.new_empty(logits.shape[:-1], dtype=reference.wide(logits)) for _ in range(3))
    return logits.new_empty(logits.shape), kl, lse, mean


@operator("relaxed_codes_backward")
def _backward(
    d_weights: Tensor, d_kl: Tensor, weights: Tensor, logits: Tensor, lse: Tensor, mean: Tensor, temperature: float
) -> Tensor:
    """Gradient of logits (..., K)."""
    rows = (_rows(tensor) for tensor in (d_weights, weights, logits))
    numbers = (number.reshape(-1).contiguous() for number in (d_kl, lse, mean))
    backward: Any = _triton().backward if _is_fused(logits) else _backward_in_pieces
    return backward(*rows, *numbers, temperature).view(logits.shape)


@shapes_of("relaxed_codes_backward")
def _(d_weights: Tensor, d_kl: Tensor, weights: Tensor, logits: Tensor, *rest: Any) -> Tensor:
    return logits.new_empty(logits.shape)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, _, ctx.temperature = inputs
    weights, _, lse, mean = output
    ctx.save_for_backward(weights, logits, lse, mean)
    ctx.mark_non_differentiable(lse, mean)


def _differentiate(ctx: Any, d_weights: Tensor, d_kl: Tensor, *_: Tensor) -> tuple[Tensor, None, None]:
    return _backward(d_weights, d_kl, *ctx.saved_tensors, ctx.temperature), None, None


gradient_of("relaxed_codes", _remember, _differentiate)


def _rows(tensor: Tensor) -> Tensor:
    """(..., K) as contiguous (rows, K): no copy of what a channels_last convolution writes."""
    return tensor.reshape(-1, tensor.shape[-1]).contiguous()


def _forward_in_pieces(logits: Tensor, uniform: Tensor, temperature: float) -> tuple[Tensor, ...]:
    """logits, uniform (rows, K) -> weights (rows, K), kl, lse and mean logit (rows)."""
    n_rows, codebook = logits.shape
    kind = reference.wide(logits)
    step = max(PIECE // codebook, 1)
    weights = torch.empty_like(logits)
    kl, lse, mean = (logits.new_empty(n_rows, dtype=kind) for _ in range(3))
    noisy, odds = (logits.new_empty((min(step, n_rows), codebook), dtype=kind) for _ in range(2))
    for start in range(0, n_rows, step):
        piece = slice(start, start + step)
        x = logits[piece].to(kind)
        a, b = noisy[: len(x)], odds[: len(x)]
        torch.log(uniform[piece].to(kind), out=a).neg_().log_()
        torch.sub(x, a, out=a).div_(temperature)
        torch.softmax(a, -1, out=b)
        weights[piece] = b
        top = x.amax(-1, keepdim=True)
        torch.sub(x, top, out=a)
        torch.exp(a, out=b)
        total = b.sum(-1)
        share = b.mul_(a).sum(-1).div_(total)  # sum of p * (logit - top)
        log_total = total.log_()
        kl[piece] = share - log_total + math.log(codebook)
        lse[piece] = log_total.add_(top[:, 0])
        mean[piece] = share.add_(top[:, 0])
    return weights, kl, lse, mean


def _backward_in_pieces(
    d_weights: Tensor, weights: Tensor, logits: Tensor, d_kl: Tensor, lse: Tensor, mean: Tensor, temperature: float
) -> Tensor:
    """d_weights, weights, logits (rows, K), the others (rows) -> d_logits (rows, K)."""
    n_rows, codebook = logits.shape
    kind = reference.wide(logits)
    step = max(PIECE // codebook, 1)
    d_logits = torch.empty_like(logits)
    first, second = (logits.new_empty((min(step, n_rows), codebook), dtype=kind) for _ in range(2))
    for start in range(0, n_rows, step):
        piece = slice(start, start + step)
        x, w, d_w = logits[piece].to(kind), weights[piece].to(kind), d_weights[piece].to(kind)
        a, b = first[: len(x)], second[: len(x)]
        along = torch.mul(d_w, w, out=a).sum(-1, keepdim=True)
        torch.sub(d_w, along, out=a).mul_(w).div_(temperature)
        p = torch.sub(x, lse[piece, None], out=b).exp_().mul_(d_kl[piece, None])
        d_logits[piece] = a.addcmul_(p, x - mean[piece, None])
    return d_logits
