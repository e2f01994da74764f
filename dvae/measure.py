"""How good a discrete VAE is: its reconstructions of held-out pictures, the codes in use, and what relaxation hides."""

import itertools
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from cluster.process import Place, gathered
from data_pipeline.contents import picture_of
from data_pipeline.folders import Shards
from data_pipeline.loader import to_pixels
from dvae.likelihood import Likelihood, map_pixels, most_likely_pixels, pixel_nats
from dvae.model import Dvae
from dvae.noise import uniform_rows
from dvae.objective import effective_kl_weight, hardened
from dvae.ssim import ssim
from kernels.relaxed_codes import relaxed_codes

BATCH, BATCH_SIDE = 128, 64  # pictures at a time, and the side above which they are fewer
N_EVALUATION = 1_024  # held-out pictures
N_ELBO = 256  # of them, evenly spread: these are decoded three times
N_SHOWN = 8
EVALUATION = 2**48  # added to a picture's number, it is a step that no training has: each picture's own noise

Measures = dict[str, float]


@dataclass(frozen=True)
class Measured:
    """Values by name; counts (K,) int64 of all codes; the first pictures (n, 3, P, P) and what is drawn of them."""

    values: Measures
    counts: Tensor
    originals: Tensor
    drawn: Tensor


@dataclass(frozen=True)
class Elbo:
    """How the evidence lower bound of a picture is taken: the noise's seed, the relaxation's temperature, and the
    likelihood with its floor of ln b."""

    seed: int
    tau: float
    min_log_scale: float
    likelihood: Likelihood = "logit-laplace"


class HeldOut:
    """The first held-out pictures, of which each rank keeps and measures a share."""

    def __init__(self, shards: Shards, side: int, place: Place, count: int = N_EVALUATION) -> None:
        self.place = place
        self.total = min(count, len(shards))
        share = -(-self.total // place.world_size)
        self.numbers = range(self.total)[place.rank * share : (place.rank + 1) * share]
        samples = itertools.islice(shards, self.numbers.start, self.numbers.stop)
        pictures = [picture_of(sample, side) for sample in samples]
        self.pixels = to_pixels(np.stack(pictures)) if pictures else torch.empty(0, 3, side, side)

    @torch.no_grad()
    def measure(self, model: Dvae, elbo: Elbo) -> Measured:
        """Quality on the pictures, coded by argmax without noise; the same values on every rank.

        val/psnr_db is the mean over pictures of -10 log10(mean squared error) with peak 1;
        val/psnr_of_mean_db takes the mean error first; val/ssim is as in dvae/ssim.py; val/codes_used is
        the share of the codebook that occurs; val/perplexity is exp of the entropy of code frequencies;
        val/elbo_... are as in `elbos`, and their gap is how far the relaxed bound flatters (section 2.1).
        """
        errors, likenesses, bounds = list[Tensor](), list[Tensor](), list[Tensor]()
        shown: list[Tensor] = []
        counts = torch.zeros(model.config.codebook, dtype=torch.int64, device=self.place.device)
        every = max(1, self.total // N_ELBO)
        for numbers, part in self._parts():
            mapped = map_pixels(part).contiguous(memory_format=torch.channels_last)
            logits = model.encoder(mapped)
            codes = logits.argmax(1)
            drawn = most_likely_pixels(model.decode(codes))
            errors.append((drawn - part).square().mean((1, 2, 3)).double().cpu())
            likenesses.append(ssim(drawn, part).double().cpu())
            counts += torch.bincount(codes.flatten(), minlength=len(counts))
            rows = [row for row, number in enumerate(numbers) if number % every == 0]
            if rows:
                places = [numbers[row] for row in rows]
                bounds.append(elbos(model, mapped[rows], logits[rows], places, elbo))
            if len(shown) * len(part) < N_SHOWN:
                shown.append(drawn[:N_SHOWN].cpu())
        if self.place.world_size > 1:
            dist.all_reduce(counts)
        error, likeness = self._whole(errors).clamp(min=1e-10), self._whole(likenesses)
        relaxed, hard = self._whole(bounds).mean(0).tolist()
        used, perplexity = usage_of(counts)
        values = {
            "val/psnr_db": -10 * error.log10().mean().item(),
            "val/psnr_of_mean_db": -10 * error.mean().log10().item(),
            "val/codes_used": used,
            "val/perplexity": perplexity,
            "val/ssim": likeness.mean().item(),
            "val/elbo_relaxed": relaxed,
            "val/elbo_hard": hard,
            "val/elbo_gap": relaxed - hard,
        }
        drawn = torch.cat([*shown, self.pixels[:0]])[:N_SHOWN]
        return Measured(values, counts.cpu(), self.pixels[: len(drawn)], drawn)

    @torch.no_grad()
    def reconstructions(self, model: Dvae) -> Tensor:
        """(n, 3, P, P) of this rank's pictures, on the CPU."""
        mapped = (map_pixels(part).contiguous(memory_format=torch.channels_last) for _, part in self._parts())
        drawn = [most_likely_pixels(model.decode(model.encode(part))).cpu() for part in mapped]
        return torch.cat([*drawn, self.pixels[:0]])

    def _parts(self) -> list[tuple[range, Tensor]]:
        """(numbers of the pictures, their pixels on the device), as many at a time as fit."""
        batch = max(1, min(BATCH, BATCH * BATCH_SIDE**2 // self.pixels.shape[-1] ** 2))
        firsts = range(0, len(self.pixels), batch)
        return [(self.numbers[i : i + batch], self.pixels[i : i + batch].to(self.place.device)) for i in firsts]

    def _whole(self, parts: list[Tensor]) -> Tensor:
        """The rows of all ranks, in the order of the pictures."""
        return torch.cat([part for rank in gathered(self.place, parts) for part in rank])


def elbos(model: Dvae, mapped: Tensor, logits: Tensor, numbers: list[int], elbo: Elbo) -> Tensor:
    """(B, 2) float64: each picture's evidence lower bound in nats per pixel value, relaxed and hard.

    Both are the mean log-likelihood of the pixels less the divergence of the codes from the uniform prior. The hard
    bound decodes codes that are drawn, the relaxed one what their relaxation makes of the same noise.
    """
    shape = (model.config.grid, model.config.grid, model.config.codebook)
    noise = [uniform_rows(elbo.seed, EVALUATION + number, range(1), shape, logits.device) for number in numbers]
    weights, kl = relaxed_codes(logits.permute(0, 2, 3, 1), torch.cat(noise), elbo.tau)
    divergence = effective_kl_weight(model.config, 1.0) * kl.mean((1, 2)).double()
    found = []
    for codes in (weights, hardened(weights)):
        parameters = model.decoder(codes.permute(0, 3, 1, 2))
        nats = pixel_nats(parameters, mapped, elbo.min_log_scale, elbo.likelihood).mean((1, 2, 3)).double()
        found.append(-(nats + divergence).cpu())
    return torch.stack(found, 1)


def counts_of(codes: Tensor, codebook: int, place: Place) -> Tensor:
    """(K,) int64: how often each code occurs, over all ranks."""
    counts = torch.bincount(codes.flatten(), minlength=codebook)
    if place.world_size > 1:
        dist.all_reduce(counts)
    return counts


def usage_of(counts: Tensor) -> tuple[float, float]:
    """(share of the codebook that occurs, perplexity of the frequencies) of how often each code occurs."""
    share = counts.double() / counts.sum()
    entropy = -torch.special.xlogy(share, share).sum()
    return (counts > 0).double().mean().item(), entropy.exp().item()
