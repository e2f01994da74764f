"""Captions -> image codes: which code is drawn at each slot, and from which random numbers.

A candidate is a pure function of (weights, caption, seed, number, settings): its noise comes from a
counter, and a draw too close to call in the arithmetic of a batch is settled by a pass over that
candidate alone. So neither the batch size nor what is drawn beside it matters. (In 16 bit, where no
margin would do, draws are not settled: there only equal batches draw equal pictures.)
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from data_pipeline.order import SAMPLE, counter_random
from pretrain.decoder import Decoder
from pretrain.model import Transformer

UNKNOWN = -1
# Logits of one candidate in different batches differ by rounding: in float32 and 12 layers by up to 1.7e-6 of
# the largest of them (measured). Draws that a difference of MARGIN times that one could change are settled.
MARGIN = 4e-6


@dataclass(frozen=True)
class Taste:
    """How codes are chosen: see SampleConfig."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    cfg_scale: float = 1.0

    def margin(self, logits: Tensor) -> Tensor:
        """(B, 1): how wrong (B, K) logits may be, in units of the tempered ones; guidance adds up the errors of two."""
        errors = abs(self.cfg_scale) + abs(1 - self.cfg_scale)
        return logits.abs().amax(-1, keepdim=True).clamp(min=1.0) * (MARGIN * errors / self.temperature)


def noise_keys(caption: str, seed: int, candidate: int, count: int) -> Tensor:
    """(count,) int64: the random numbers of one candidate, one a slot."""
    digest = int.from_bytes(hashlib.sha256(caption.encode()).digest()[:8])
    return torch.from_numpy(counter_random(seed, SAMPLE, digest, candidate).integers(2**63, size=count))


def gumbel_noise(keys: Tensor, count: int) -> Tensor:
    """(B,) int64 keys -> (B, count) float32 standard Gumbel numbers, the same on every device but for rounding.

    Each key starts a splitmix64 sequence (Steele, Lea and Flood 2014), whose constants these are.
    """
    z = keys[:, None] + torch.arange(1, count + 1, device=keys.device) * -0x61C8864680B583EB
    z = z.bitwise_xor_(_shifted(z, 30)).mul_(-0x40A7B892E31B1A47)
    z = z.bitwise_xor_(_shifted(z, 27)).mul_(-0x6B2FB644ECCEEE15)
    z = z.bitwise_xor_(_shifted(z, 31))
    uniform = _shifted(z, 11).float().add_(0.5).mul_(-(2.0**-53)).clamp_(2.0**-24 - 1)  # minus a number in (0, 1)
    return uniform.log1p_().neg_().log_().neg_()  # log1p: the largest Gumbel numbers come of the smallest uniform


def _shifted(z: Tensor, bits: int) -> Tensor:
    """z >> bits as of unsigned numbers."""
    return (z >> bits).bitwise_and_((1 << (64 - bits)) - 1)


def kept_from(logits: Tensor, top_k: int, top_p: float, slack: Tensor | float = 0.0, sure: bool = False) -> Tensor:
    """(B, 1): the least logit of (B, K) that is kept.

    top_k = 0 and top_p = 1 keep all; ties at the edge are kept. slack: whatever might be kept if each logit
    were wrong by up to half of it; with `sure`, what would be kept however they were wrong, perhaps none.
    """
    edge = torch.full_like(logits[:, :1], -torch.inf)
    if top_k and top_k < logits.shape[-1]:
        last, next_one = logits.topk(top_k + 1).values[:, -2:].split(1, -1)
        edge = next_one + slack if sure else last - slack
    if top_p < 1:
        ordered = logits.sort(descending=True).values
        probability = ordered.masked_fill(ordered < edge, -torch.inf).softmax(-1)
        # What stands before is enough already; half the slack in each logit moves a probability by a quarter of it.
        enough = probability.cumsum(-1) - probability >= top_p + (-slack if sure else slack) / 4
        last, next_one = ordered.masked_fill(enough, torch.inf), ordered.masked_fill(~enough, -torch.inf)
        edge = edge.maximum(next_one.amax(-1, True) + slack if sure else last.amin(-1, True) - slack)
    return edge


def pick(logits: Tensor, keys: Tensor, taste: Taste) -> tuple[Tensor, Tensor]:
    """(B, K) logits and (B,) keys -> (B,) codes, and (B,) bool: would logits within the margin give the same?

    The code with the largest sum of logit and Gumbel noise: a draw from softmax(logits / temperature).
    """
    doubt = 2 * taste.margin(logits)
    logits = logits / taste.temperature
    noisy = logits + gumbel_noise(keys, logits.shape[-1])
    if not taste.top_k and taste.top_p == 1:
        return _best(noisy, doubt)

    def best_from(edge: Tensor) -> tuple[Tensor, Tensor]:
        return _best(noisy.masked_fill(logits < edge, -torch.inf), doubt)

    picked, certain = best_from(kept_from(logits, taste.top_k, taste.top_p))
    for sure in (False, True):
        other, clear = best_from(kept_from(logits, taste.top_k, taste.top_p, doubt, sure))
        certain &= clear & (other == picked)
    return picked, certain


def _best(noisy: Tensor, doubt: Tensor) -> tuple[Tensor, Tensor]:
    """(B,) codes of the largest of (B, K); (B,) bool: is it the largest by `doubt` (B, 1) or more?"""
    values, codes = noisy.topk(min(2, noisy.shape[-1]), -1)
    return codes[:, 0], (values[:, :1] - values[:, -1:] >= doubt)[:, 0] | (noisy.shape[-1] == 1)


@torch.inference_mode()
def draw_rows(
    model: Transformer, text: Tensor, keys: Tensor, taste: Taste, known: Tensor | None = None
) -> Iterator[Tensor]:
    """Draw the pictures of C captions with N candidates each, and give them after each row that is done.

    text    (C, T-1) ids with PAD
    keys    (C N, I) int64 noise keys, the candidates of a caption side by side
    known   (C, I) int64 codes that are given, UNKNOWN where they are to be drawn; what leads the picture is
            read in one pass
    Yields int64 codes (C N, slots so far); the last ones are (C N, I).
    """
    n_image, grid = model.layout.n_image, model.sizes.grid
    candidates = len(keys) // len(text)
    decoder = Decoder(model, text, candidates, taste.cfg_scale)
    known = torch.full((len(text), n_image), UNKNOWN, device=text.device) if known is None else known
    unknown = (known == UNKNOWN).any(0).nonzero()
    first = int(unknown[0]) if len(unknown) else n_image
    decoder.read(known[:, :first])
    codes = known.repeat_interleave(candidates, 0)
    given = codes != UNKNOWN
    codes = codes.clamp(min=0)
    exact = model.row.weight.dtype == torch.float32  # in 16 bit no margin would do
    for slot in range(first, n_image):
        logits = decoder.step(codes[:, slot - 1] if slot else codes[:, 0], slot)
        drawn, certain = pick(logits, keys[:, slot], taste)
        if exact:
            for row in (~certain & ~given[:, slot]).nonzero().flatten().tolist():
                alone = decoder.whole(codes[row], row, slot)[None]
                drawn[row] = pick(alone, keys[row : row + 1, slot], taste)[0][0]
        codes[:, slot] = torch.where(given[:, slot], codes[:, slot], drawn)
        if (slot + 1) % grid == 0:
            yield codes[:, : slot + 1]
    if first == n_image:
        yield codes
