"""Every kernel's door in plain torch: the definitions that fast versions are tested against."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

NORM_EPS = 1e-5  # torch's default; Ramesh et al. 2021 give no number


def masked_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(D)) v over the keys that `mask` (S, S) allows; q, k, v are (B, H, S, D)."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def relaxed_codes(logits: Tensor, uniform: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Gumbel-softmax weights and the divergence from a uniform prior, over the last axis.

    logits   (..., K) float
    uniform  (..., K) in (0, 1): the noise, given, so that the result is a pure function
    Returns weights (..., K), and (...) nats of KL(softmax(logits) || uniform over K).
    Ramesh et al. 2021, section 2.1; Jang et al. 2016 for the relaxation.
    """
    gumbel = -torch.log(-torch.log(uniform))
    weights = F.softmax((logits + gumbel) / temperature, dim=-1)
    log_p = F.log_softmax(logits, dim=-1)
    kl = (log_p.exp() * log_p).sum(-1) + math.log(logits.shape[-1])
    return weights, kl


class _ScaledGradient(torch.autograd.Function):
    """The identity, whose gradient is multiplied by `factor`; what is then Inf or NaN becomes 0."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, factor: Tensor) -> Tensor:
        ctx.save_for_backward(factor)
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        scaled = gradient * ctx.saved_tensors[0]
        return torch.where(scaled.isfinite(), scaled, 0.0), None


def leave(x: Tensor, branch: Tensor, scale: Tensor | None = None) -> Tensor:
    """The end of a resblock: x + branch, in x's dtype.

    x (..., M) is the residual stream, branch (..., M) the resblock's output, perhaps in 16 bit.
    With `scale`, one float32 number, the gradient that enters the branch is that of the stream
    times the scale, filtered (Inf and NaN become 0), then cast (Ramesh et al. 2021, figure 4).
    """
    if scale is not None:
        branch = _ScaledGradient.apply(branch.to(wide(x)), scale)
    return (x + branch).to(x.dtype)


def boundary(
    x: Tensor,
    branch: Tensor | None,
    gain: Tensor,
    bias: Tensor,
    leave_scale: Tensor | None = None,
    enter_scale: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """The end of one resblock and the layer norm of the next: (x', h).

    x' = x + branch as `leave` has it (x itself if branch is None), h = layer_norm(x') * gain + bias,
    normalised in float32 and written in `dtype` (the branch's if not given, x's if there is none).
    gain and bias (M). With `enter_scale`, gradients that reach h are those of the loss times that
    scale: the layer norm's gradient is divided by it and filtered before it joins the stream's.
    Gradients of gain and bias are neither divided nor filtered: the optimiser does the one, and
    looks for Inf and NaN in them (Ramesh et al. 2021, section 2.4 and figure 4).
    """
    dtype = dtype or (x if branch is None else branch).dtype
    if branch is not None:
        x = leave(x, branch, leave_scale)
    entering = x.to(wide(x))
    if enter_scale is not None:
        entering = _ScaledGradient.apply(entering, enter_scale.reciprocal())
    h = F.layer_norm(entering, gain.shape, gain.to(entering.dtype), bias.to(entering.dtype), NORM_EPS)
    return x, h.to(dtype)


def wide(x: Tensor) -> torch.dtype:
    """What arithmetic on x is done in: float32, or float64 if x is that."""
    return torch.promote_types(x.dtype, torch.float32)
