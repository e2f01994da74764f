"""Structural similarity of pictures (Wang, Bovik, Sheikh and Simoncelli 2004)."""

import torch
import torch.nn.functional as F
from torch import Tensor

WINDOW, SIGMA = 11, 1.5  # section III.C
C1, C2 = 0.01**2, 0.03**2  # (K1 L)^2 and (K2 L)^2 with the range L = 1


def ssim(drawn: Tensor, original: Tensor) -> Tensor:
    """(N,) mean structural similarity of pictures (N, 3, P, P) in [0, 1], in float32.

    The mean over the places where the window lies inside the picture and over the three colours, of which the
    paper's greyscale knows one. On pictures smaller than the window it is as large as they are.
    """
    size = min(WINDOW, *drawn.shape[2:])
    window = _window(size, drawn.device).expand(5 * drawn.shape[1], 1, 1, size)
    moments = torch.cat([drawn, original, drawn * drawn, original * original, drawn * original], 1)
    moments = F.conv2d(moments, window, groups=len(window))
    moments = F.conv2d(moments, window.mT, groups=len(window))
    x, y, xx, yy, xy = moments.chunk(5, 1)
    structure = (2 * (xy - x * y) + C2) / ((xx - x * x) + (yy - y * y) + C2)
    likeness = (2 * x * y + C1) / (x * x + y * y + C1) * structure
    return likeness.mean((1, 2, 3))


def _window(size: int, device: torch.device) -> Tensor:
    """(size,) Gaussian weights that add up to 1."""
    distance = torch.arange(size, device=device) - (size - 1) / 2
    weights = torch.exp(-distance.square() / (2 * SIGMA**2))
    return weights / weights.sum()
