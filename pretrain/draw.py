"""Captions -> image codes, one slot at a time, with a key-value cache.

A candidate is a pure function of (weights, caption, seed, number): its random numbers come from a
counter, one uniform a slot, and the code is read off the cumulative distribution. So neither the
batch size nor what else is drawn beside it matters.
"""

import hashlib

import torch
from torch import Tensor

from data_pipeline.order import SAMPLE, counter_random
from pretrain.model import KeyValues, Transformer


def uniforms(caption: str, seed: int, candidate: int, count: int) -> Tensor:
    """(count,) float64 in [0, 1): the random numbers of one candidate."""
    digest = int.from_bytes(hashlib.sha256(caption.encode()).digest()[:8])
    return torch.from_numpy(counter_random(seed, SAMPLE, digest, candidate).random(count))


def filter_logits(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """(B, K) image logits with all but the likeliest codes at -inf; at least one is kept.

    top_k = 0 and top_p = 1 keep everything. Ties at the edge of top_k are kept.
    """
    if top_k and top_k < logits.shape[-1]:
        edge = logits.topk(top_k).values[:, -1:]
        logits = logits.masked_fill(logits < edge, -torch.inf)
    if top_p < 1:
        ordered, index = logits.sort(descending=True)
        probability = ordered.softmax(-1)
        beyond = probability.cumsum(-1) - probability >= top_p  # what stands before is enough already
        logits = logits.masked_fill(beyond.scatter(1, index, beyond), -torch.inf)
    return logits


def pick(logits: Tensor, uniform: Tensor) -> Tensor:
    """(B,) codes: the inverse of the cumulative distribution of (B, K) logits at (B,) uniforms."""
    cumulative = logits.double().softmax(-1).cumsum(-1)
    target = (uniform.to(logits.device) * cumulative[:, -1])[:, None]
    return torch.searchsorted(cumulative, target, right=True).squeeze(1).clamp(max=logits.shape[-1] - 1)


@torch.no_grad()
def draw_codes(
    model: Transformer, text: Tensor, uniform: Tensor, temperature: float, top_k: int, top_p: float
) -> Tensor:
    """Sample image codes: text (B, T-1), uniform (B, I) -> (B, I) int64."""
    n_image = model.layout.n_image
    cache = KeyValues(model.config, model.layout, len(text), model.row.weight)
    codes = torch.zeros(len(text), n_image, dtype=torch.int64, device=text.device)
    model.hidden(model.embed_text(text), cache)
    for slot in range(n_image):
        before = codes[:, max(slot - 1, 0) : max(slot, 1)]
        x = model.hidden(model.embed_image(before, first=slot), cache)
        logits = model.image_head(x[:, 0]).float() / temperature
        codes[:, slot] = pick(filter_logits(logits, top_k, top_p), uniform[:, slot])
    return codes
