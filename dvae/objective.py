"""The training objective of Ramesh et al. 2021, section 2.1 and appendix A: one module, so that its ranks can share it.

Axes: B batch, K codebook, G grid side, P image side.
"""

from typing import Literal, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from dvae.config import DvaeConfig
from dvae.likelihood import Likelihood, pixel_nats
from dvae.model import Dvae
from kernels.relaxed_codes import relaxed_codes

Relaxation = Literal["gumbel", "straight-through"]


class Terms(NamedTuple):
    """loss = nats + weight * kl, of a batch: the mean over pixel values, and over positions; codes (B, G, G) int64,
    the argmax without noise."""

    loss: Tensor
    nats: Tensor
    kl: Tensor
    codes: Tensor


class Objective(nn.Module):
    """Mapped pictures and noise -> loss."""

    def __init__(
        self,
        model: Dvae,
        min_log_scale: float,
        relaxation: Relaxation = "gumbel",
        likelihood: Likelihood = "logit-laplace",
    ) -> None:
        """relaxation: `gumbel` decodes the relaxed codes, as the paper; `straight-through` hard ones with the
        gradient of the relaxed (Jang et al. 2016, section 2.2)."""
        super().__init__()
        self.model, self.min_log_scale = model, min_log_scale
        self.relaxation, self.likelihood = relaxation, likelihood

    def forward(self, mapped: Tensor, uniform: Tensor, tau: float, beta: float) -> Terms:
        """mapped (B, 3, P, P), uniform (B, G, G, K) in (0, 1), temperature of the relaxation, weight of KL."""
        logits = self.model.encoder(mapped).permute(0, 2, 3, 1)  # (B, G, G, K)
        weights, kl = relaxed_codes(logits, uniform, tau)
        if self.relaxation == "straight-through":
            weights = hardened(weights) + (weights - weights.detach())
        parameters = self.model.decoder(weights.permute(0, 3, 1, 2))
        nats = pixel_nats(parameters, mapped, self.min_log_scale, self.likelihood).mean()
        kl = kl.mean()
        loss = nats + effective_kl_weight(self.model.config, beta) * kl
        return Terms(loss, nats, kl, logits.argmax(-1))


def hardened(weights: Tensor) -> Tensor:
    """(..., K) relaxed codes -> one-hot of the largest, without gradient."""
    return F.one_hot(weights.detach().argmax(-1), weights.shape[-1]).to(weights.dtype)


def effective_kl_weight(config: DvaeConfig, beta: float) -> float:
    """Weight of the per-position mean KL beside the per-value mean likelihood.

    Both are sums divided by the number of pixel values (A.2), so beta * G^2 / (3 P^2): beta / 192 at
    a reduction of 8.
    """
    return beta * config.grid**2 / (3 * config.image_side**2)
