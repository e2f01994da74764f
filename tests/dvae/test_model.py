"""The encoder and decoder have the published shape; the likelihood and the schedules are the paper's."""

import math

import pytest
import torch

from cluster.settings import SettingError
from dvae.config import DvaeConfig, ScheduleConfig
from dvae.likelihood import NORMAL_SCALE, Likelihood, map_pixels, most_likely_pixels, pixel_nats, unmap_pixels
from dvae.measure import usage_of
from dvae.model import Block, Dvae
from dvae.schedule import kl_weight, learning_rate, temperature

SMALL = DvaeConfig(image_side=16, fold=1, width=8, n_groups=3, n_blocks=1, n_init=8, codebook=32)
PAPER = DvaeConfig(image_side=256, fold=1, width=256, n_groups=4, n_blocks=2, n_init=128, codebook=8192)


def count(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_the_published_size_has_the_published_parameters() -> None:
    with torch.device("meta"):
        model = Dvae(PAPER)
    assert round(count(model.encoder) / 1e6, 1) == 53.8
    assert round(count(model.decoder) / 1e6, 1) == 43.8
    assert PAPER.grid == 32


def test_codes_and_reconstructions_have_their_shapes() -> None:
    model = Dvae(SMALL)
    codes = model.encode(torch.full((2, 3, 16, 16), 0.5))
    assert codes.shape == (2, 4, 4) and codes.dtype == torch.int64
    assert model.decode(codes).shape == (2, 6, 16, 16)


def test_decoding_codes_equals_decoding_one_hot_weights() -> None:
    model = Dvae(SMALL)
    codes = torch.randint(SMALL.codebook, (2, 4, 4))
    one_hot = torch.nn.functional.one_hot(codes, SMALL.codebook).permute(0, 3, 1, 2).float()
    assert torch.equal(model.decode(codes), model.decoder(one_hot))


def test_a_block_that_enlarges_is_the_block_of_the_enlarged_picture() -> None:
    """And so are the gradients of its input and weights."""
    plain, block = (Block(8, 4, (1, 3, 3, 3), 0.25, torch.float64, enlarges).double() for enlarges in (False, True))
    plain.load_state_dict(block.state_dict())
    x = torch.randn(2, 8, 3, 5, dtype=torch.float64, requires_grad=True)
    wanted = plain(x.repeat_interleave(2, 2).repeat_interleave(2, 3))
    direction = torch.randn_like(wanted)
    torch.testing.assert_close(block(x), wanted, rtol=1e-12, atol=1e-12)
    wanted = torch.autograd.grad((wanted * direction).sum(), [x, *plain.parameters()])
    found = torch.autograd.grad((block(x) * direction).sum(), [x, *block.parameters()])
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def test_another_picture_size_is_refused_with_its_shape() -> None:
    with pytest.raises(ValueError, match=r"\(2, 3, 8, 16\)"):
        Dvae(SMALL).encode(torch.zeros(2, 3, 8, 16))


def test_a_side_that_does_not_divide_is_refused() -> None:
    with pytest.raises(SettingError, match="image_side=60"):
        DvaeConfig(image_side=60)


@pytest.mark.parametrize("likelihood", ["logit-laplace", "logit-normal"])
def test_the_likelihood_is_a_density_on_the_unit_interval(likelihood: Likelihood) -> None:
    x = torch.linspace(1e-5, 1 - 1e-5, 400_001, dtype=torch.float64)
    grid = x.view(1, 1, 1, -1).expand(1, 3, 1, -1)
    for mean, log_scale in ((0.0, 0.0), (1.5, -1.0), (-0.7, 0.3)):
        floor = -40.0  # far below, so that the soft floor changes nothing
        parameters = torch.tensor([mean] * 3 + [log_scale] * 3).view(1, 6, 1, 1).expand(1, 6, 1, len(x)).double()
        density = torch.exp(-pixel_nats(parameters, grid, floor, likelihood))[0, 0, 0]
        assert torch.trapezoid(density, x).item() == pytest.approx(1.0, abs=2e-3)


@pytest.mark.parametrize("likelihood", ["logit-laplace", "logit-normal"])
def test_the_likelihood_matches_torchs(likelihood: Likelihood) -> None:
    torch.manual_seed(0)
    parameters, x = torch.randn(2, 6, 3, 3, dtype=torch.float64), torch.rand(2, 3, 3, 3, dtype=torch.float64)
    means, scales = parameters[:, :3], parameters[:, 3:].exp()
    of_logits: torch.distributions.Distribution = torch.distributions.Laplace(means, scales)
    if likelihood == "logit-normal":
        of_logits = torch.distributions.Normal(means, NORMAL_SCALE)
    sigmoid = torch.distributions.transforms.SigmoidTransform()
    want = -torch.distributions.TransformedDistribution(of_logits, [sigmoid]).log_prob(x)
    torch.testing.assert_close(pixel_nats(parameters, x, -40.0, likelihood), want)


def test_the_floor_bounds_the_gradient_of_a_sure_pixel() -> None:
    parameters = torch.zeros(1, 6, 1, 1)
    parameters[:, 3:] = -8.0
    parameters.requires_grad_()
    pixel_nats(parameters, torch.full((1, 3, 1, 1), 0.6), -1.5).sum().backward()
    assert parameters.grad is not None
    assert parameters.grad[:, :3].abs().max().item() == pytest.approx(math.exp(1.5), rel=0.01)


def test_pixels_map_to_the_papers_interval_and_back() -> None:
    pixels = torch.linspace(0, 1, 256)
    mapped = map_pixels(pixels)
    assert (mapped.min().item(), mapped.max().item()) == (pytest.approx(0.1), pytest.approx(0.9))
    torch.testing.assert_close(unmap_pixels(mapped), pixels)
    means = torch.logit(mapped).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    parameters = torch.cat([means, torch.zeros_like(means)], 1)
    torch.testing.assert_close(most_likely_pixels(parameters)[0, 0].flatten(), pixels, atol=1e-6, rtol=0)


def test_the_schedules_are_the_papers() -> None:
    paper = ScheduleConfig()
    assert (learning_rate(paper, 0), learning_rate(paper, 1_200_000)) == (1e-4, pytest.approx(1.25e-6))
    assert learning_rate(paper, 3_000_000) == learning_rate(paper, 1_200_000)
    assert (temperature(paper, 0), temperature(paper, 75_000), temperature(paper, 150_000)) == (
        1.0, pytest.approx((1 + 1 / 16) / 2), pytest.approx(1 / 16),
    )  # fmt: skip
    assert (kl_weight(paper, 0), kl_weight(paper, 2_500), kl_weight(paper, 9_999)) == (0.0, pytest.approx(3.3), 6.6)


def test_code_usage_counts_what_occurs() -> None:
    assert usage_of(torch.tensor([1, 1, 1, 1, 0, 0, 0, 0])) == (0.5, pytest.approx(4.0))
    assert usage_of(torch.tensor([0, 9, 0, 0, 0, 0, 0, 0])) == (0.125, pytest.approx(1.0))
