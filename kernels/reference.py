"""Every kernel's door in plain torch: the definitions that fast versions are tested against."""

import torch
import torch.nn.functional as F
from torch import Tensor


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
    kl = (log_p.exp() * log_p).sum(-1) + torch.log(torch.tensor(float(logits.shape[-1])))
    return weights, kl
