"""How good a discrete VAE is: PSNR of hard reconstructions, and how many codes are in use."""

import torch
from torch import Tensor

from dvae.likelihood import map_pixels, most_likely_pixels
from dvae.model import Dvae

BATCH = 128


@torch.no_grad()
def measure(model: Dvae, pixels: Tensor, device: torch.device) -> dict[str, float]:
    """Quality on pictures (N, 3, P, P) in [0, 1], coded by argmax without noise.

    val/psnr_db is the mean over pictures of -10 log10(mean squared error) with peak 1;
    val/psnr_of_mean_db takes the mean error first; val/codes_used is the share of the codebook that
    occurs; val/perplexity is exp of the entropy of code frequencies.
    """
    codes, errors = [], []
    for part in pixels.split(BATCH):
        part = part.to(device)
        code = model.encode(map_pixels(part).contiguous(memory_format=torch.channels_last))
        drawn = most_likely_pixels(model.decode(code))
        errors.append((drawn - part).square().mean((1, 2, 3)).double().cpu())
        codes.append(code.cpu())
    error = torch.cat(errors).clamp(min=1e-10)
    used, perplexity = code_usage(torch.cat(codes), model.config.codebook)
    return {
        "val/psnr_db": -10 * error.log10().mean().item(),
        "val/psnr_of_mean_db": -10 * error.mean().log10().item(),
        "val/codes_used": used,
        "val/perplexity": perplexity,
    }


def code_usage(codes: Tensor, codebook: int) -> tuple[float, float]:
    """(share of the codebook that occurs, perplexity of the frequencies) of any tensor of codes."""
    count = torch.bincount(codes.flatten(), minlength=codebook).double()
    share = count / count.sum()
    entropy = -torch.special.xlogy(share, share).sum()
    return (count > 0).double().mean().item(), entropy.exp().item()
