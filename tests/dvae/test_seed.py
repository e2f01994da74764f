"""The seeded start uses its whole codebook and is as good as a k-means patch codec, before training."""

import torch

from dvae.config import DvaeConfig
from dvae.likelihood import map_pixels, most_likely_pixels
from dvae.model import Dvae
from dvae.seed import k_means, seed_codes

CONFIG = DvaeConfig(image_side=32, fold=8, width=64, n_groups=1, n_blocks=2, n_init=64, codebook=128)


def pictures(count: int) -> torch.Tensor:
    """Discs of random colour, place and size on white: flat pictures, on which codes collapse."""
    generator = torch.Generator().manual_seed(0)
    axis = torch.linspace(0, 1, 32)
    centre, size = torch.rand(count, 2, 1, 1, generator=generator), torch.rand(count, 1, 1, generator=generator)
    inside = (axis[:, None] - centre[:, 0]) ** 2 + (axis - centre[:, 1]) ** 2 < (0.1 + 0.3 * size) ** 2
    colour = torch.rand(count, 3, 1, 1, generator=generator)
    return torch.where(inside[:, None], colour, torch.ones(()))


def psnr_and_use(model: Dvae, pixels: torch.Tensor) -> tuple[float, float]:
    with torch.no_grad():
        codes = model.encode(map_pixels(pixels))
        error = (most_likely_pixels(model.decode(codes)) - pixels).square().mean((1, 2, 3))
    return -10 * error.log10().mean().item(), len(codes.unique()) / model.config.codebook


def test_every_code_is_in_use_before_the_first_step() -> None:
    model = Dvae(CONFIG)
    pixels = pictures(256)
    share = seed_codes(model, map_pixels(pixels), torch.Generator().manual_seed(0))
    psnr, used = psnr_and_use(model, pixels)
    assert share > 0.9
    assert used > 0.9
    assert psnr > 20


def test_the_papers_start_uses_few_codes_and_draws_nothing() -> None:
    """The fault that the seeded start is there for."""
    torch.manual_seed(0)
    assert psnr_and_use(Dvae(CONFIG), pictures(256))[0] < 12


def test_each_picture_is_coded_by_the_nearest_centre() -> None:
    model, pixels = Dvae(CONFIG), pictures(64)
    seed_codes(model, map_pixels(pixels), torch.Generator().manual_seed(0))
    mapped = map_pixels(pixels)
    codes = model.encode(mapped)
    drawn = torch.sigmoid(model.decode(torch.arange(128).view(-1, 1, 1).expand(-1, 4, 4))[:, :3])  # each code's patch
    centres = torch.nn.functional.pixel_unshuffle(drawn, 8)[:, :, 1, 1]
    patches = torch.nn.functional.pixel_unshuffle(mapped, 8).permute(0, 2, 3, 1).reshape(-1, 192)
    nearest = torch.cdist(patches, centres).argmin(1)
    assert (nearest == codes.flatten()).float().mean() > 0.9


def test_k_means_finds_separate_clusters_and_leaves_no_centre_dead() -> None:
    generator = torch.Generator().manual_seed(0)
    truth = torch.arange(8.0)[:, None] * 10
    points = truth.repeat(50, 1) + 0.1 * torch.randn(400, 1, generator=generator)
    centres, nearest = k_means(points, 16, 10, generator)
    assert len(nearest.unique()) == 16
    assert torch.cdist(truth, centres).min(1).values.max() < 0.5
