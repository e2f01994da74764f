"""A start from which the codes cannot collapse: the best linear patch codec, found in seconds.

Why short runs from the paper's initialisation collapse: a one-hot vector times an embedding of
standard deviation 1/sqrt(K) is 1/sqrt(K) of a unit signal, and fresh logits (standard deviation 1)
drown in Gumbel noise (1.28). The decoder learns to ignore its input, the encoder's gradient is then
noise, and on flat pictures it drifts to a handful of codes before the decoder listens. Hours of
training and a large KL weight repair that; a few hundred steps do not.

So the linear path through the network (stem, skips, heads) starts as a principal component analysis
of patches, and the codebook as their k-means: logits are -distance^2 / 2 to each centre, so every
code is some patch's nearest from step 0 and the decoder draws that centre. Residual branches start
at zero. Training only has to improve on it.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dvae.likelihood import EPS
from dvae.model import Block, Conv, Dvae

N_PATCHES = 65_536  # patches the statistics are taken from
ROUNDS = 10  # of k-means
MARGIN_NATS = 12.0  # median lead of the nearest code over the next, before noise
MIN_LEAD = 1e-4  # of the mean squared norm: on a few plain colours centres coincide, and the lead is rounding
LOG_SCALE = -1.0  # first ln b of the likelihood: about the error of the linear codec in logit space


@torch.no_grad()
def seed_codes(model: Dvae, mapped: Tensor, generator: torch.Generator) -> float:
    """Initialise `model` from mapped pictures (N, 3, P, P); returns the share of codes they use.

    Needs n_groups = 1 (one code is one fold x fold patch, so that the path is linear) and
    width, n_init >= 2 d for at least d = 1 component.
    """
    encoder, decoder, fold = model.encoder, model.decoder, model.config.fold
    patches = F.pixel_unshuffle(mapped, fold).permute(0, 2, 3, 1).flatten(0, 2)
    patches = patches[torch.randperm(len(patches), generator=generator)[:N_PATCHES]]
    d = min(model.config.width // 2, model.config.n_init // 2, patches.shape[1])
    mean, basis = _principal(patches[:16_384], d)
    points = (patches - mean) @ basis.T
    centres, nearest = k_means(points, model.config.codebook, ROUNDS, generator)
    drawn = torch.logit((mean + centres @ basis).clamp(EPS, 1 - EPS))  # what the decoder must say: (K, 3 fold^2)
    # in these units a logit is -distance^2 / 2, and an optimiser's step moves it little
    unit = (MARGIN_NATS / _median_lead(points, centres)) ** 0.5
    basis, centres = unit * basis, unit * centres
    mean_drawn, basis_drawn = _principal(drawn, d)
    embedded = (drawn - mean_drawn) @ basis_drawn.T

    for module in model.modules():
        if isinstance(module, Block):
            nn.init.zeros_(module.convs[-1].weight)  # type: ignore[arg-type]
            if isinstance(module.skip, Conv):
                nn.init.dirac_(module.skip.weight)
    both = torch.cat([basis, -basis])  # relu keeps +z in one half and -z in the other
    encoder.stem.weight[: 2 * d] = 0
    centre_tap = encoder.stem.kernel_size[0] // 2
    encoder.stem.weight[: 2 * d, :, centre_tap, centre_tap] = both
    encoder.stem.bias[: 2 * d] = -both @ mean  # type: ignore[index]
    encoder.head.weight[:, :, 0, 0] = 0
    encoder.head.weight[:, : 2 * d, 0, 0] = torch.cat([centres, -centres], 1)
    encoder.head.bias.copy_(-centres.square().sum(1) / 2)  # type: ignore[union-attr]
    decoder.embed.weight[:, :, 0, 0] *= embedded.std() * model.config.codebook**0.5
    decoder.embed.weight[: 2 * d, :, 0, 0] = torch.cat([embedded, -embedded], 1).T
    n_means = mean_drawn.numel()
    decoder.head.weight.zero_()
    decoder.head.weight[:n_means, : 2 * d, 0, 0] = torch.cat([basis_drawn, -basis_drawn]).T
    decoder.head.bias[:n_means] = mean_drawn  # type: ignore[index]
    decoder.head.bias[n_means:] = LOG_SCALE  # type: ignore[index]
    return len(nearest.unique()) / len(centres)


def k_means(points: Tensor, k: int, rounds: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Lloyd's algorithm; (k, d) centres and the (N,) nearest centre of each point.

    A centre that nobody is nearest to moves to a random point, so none is dead for long.
    """
    start = torch.randperm(len(points), generator=generator)[:k]
    centres = points[start.repeat(-(-k // len(start)))[:k]].clone()
    for _ in range(rounds):
        nearest = _nearest(points, centres)
        count = torch.bincount(nearest, minlength=k)
        total = torch.zeros_like(centres).index_add_(0, nearest, points)
        fresh = points[torch.randint(len(points), (k,), generator=generator)]
        centres = torch.where(count[:, None] > 0, total / count.clamp(min=1)[:, None], fresh)
    return centres, _nearest(points, centres)


def _principal(rows: Tensor, d: int) -> tuple[Tensor, Tensor]:
    """Mean (n,) and the first d principal directions (d, n) of rows (N, n)."""
    mean = rows.mean(0)
    return mean, torch.linalg.svd(rows - mean, full_matrices=False).Vh[:d]


def _nearest(points: Tensor, centres: Tensor) -> Tensor:
    return torch.cat([torch.cdist(part, centres).argmin(1) for part in points.split(8_192)])


def _median_lead(points: Tensor, centres: Tensor) -> float:
    """Median over points of half the squared distance to the second-nearest centre less the nearest's."""
    two = torch.cdist(points[:8_192], centres).topk(2, largest=False).values.square()
    lead = ((two[:, 1] - two[:, 0]) / 2).median().item()
    return max(lead, MIN_LEAD * points.square().sum(1).mean().item())
