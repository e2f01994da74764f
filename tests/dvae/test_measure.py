"""Held-out measures equal their definitions, whatever the ranks and the batches."""

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from cluster.process import Place
from cluster.settings import UserError
from data_pipeline.folders import Shards
from data_pipeline.loader import first_pictures
from dvae import measure
from dvae.config import DvaeConfig
from dvae.fid import Features, frechet_distance
from dvae.likelihood import Likelihood, map_pixels, most_likely_pixels, pixel_nats
from dvae.measure import EVALUATION, Elbo, HeldOut
from dvae.model import Dvae
from dvae.noise import uniform_rows
from dvae.ssim import ssim

ALONE = Place(0, 1, torch.device("cpu"))
SHAPE = DvaeConfig(image_side=16, fold=4, width=16, n_groups=1, n_blocks=1, n_init=16, codebook=32)
ELBO = Elbo(seed=3, tau=0.5, min_log_scale=-20.0)


def random_model() -> Dvae:
    torch.manual_seed(0)
    return Dvae(SHAPE).to(memory_format=torch.channels_last)  # type: ignore[call-overload]


@pytest.fixture
def shards(data: Path) -> Shards:
    return Shards(data / "images", "images", "train")


def similarity(x: np.ndarray, y: np.ndarray) -> float:
    """Wang et al. 2004, equation 13 at every place of an 11 x 11 window, in float64: (C, P, P) each."""
    axis = np.arange(11) - 5.0
    window = np.exp(-(axis[:, None] ** 2 + axis**2) / (2 * 1.5**2))
    window /= window.sum()
    places = []
    for plane_x, plane_y in zip(x, y, strict=True):
        for row in range(len(plane_x) - 10):
            for column in range(len(plane_x) - 10):
                a, b = (plane[row : row + 11, column : column + 11] for plane in (plane_x, plane_y))
                mean_a, mean_b = (window * a).sum(), (window * b).sum()
                var_a, var_b = (window * (a - mean_a) ** 2).sum(), (window * (b - mean_b) ** 2).sum()
                both = (window * (a - mean_a) * (b - mean_b)).sum()
                light = (2 * mean_a * mean_b + 0.01**2) / (mean_a**2 + mean_b**2 + 0.01**2)
                places.append(light * (2 * both + 0.03**2) / (var_a + var_b + 0.03**2))
    return float(np.mean(places))


def test_structural_similarity_is_that_of_its_paper() -> None:
    random = np.random.default_rng(0)
    x = random.random((2, 3, 15, 15))
    y = np.clip(x + 0.2 * random.normal(size=x.shape), 0, 1)
    y[1] = x[1].mean()  # flat: light is kept and structure is lost
    found = ssim(torch.from_numpy(y).float(), torch.from_numpy(x).float())
    # float32 variances are differences of numbers up to 1, beside a constant of 0.0009
    assert found.tolist() == pytest.approx([similarity(a, b) for a, b in zip(y, x, strict=True)], abs=1e-4)
    assert ssim(*[torch.from_numpy(x).float()] * 2).tolist() == pytest.approx([1, 1], abs=1e-5)
    assert ssim(torch.rand(1, 3, 8, 8), torch.rand(1, 3, 8, 8)).shape == (1,)


def test_measures_are_their_definitions(shards: Shards) -> None:
    model, pixels = random_model(), first_pictures(shards, 100, 16)
    with torch.no_grad():
        codes = model.encode(map_pixels(pixels).contiguous(memory_format=torch.channels_last))
        drawn = most_likely_pixels(model.decode(codes))
    error = (drawn - pixels).square().flatten(1).mean(1)
    found = HeldOut(shards, 16, ALONE).measure(model, ELBO)
    values = found.values
    assert values["val/psnr_db"] == pytest.approx(-10 * error.log10().mean().item(), rel=1e-5)
    assert values["val/psnr_of_mean_db"] == pytest.approx(-10 * error.mean().log10().item(), rel=1e-5)
    assert values["val/ssim"] == pytest.approx(ssim(drawn, pixels).mean().item(), rel=1e-5)
    assert values["val/codes_used"] == len(codes.unique()) / 32
    assert found.counts.tolist() == torch.bincount(codes.flatten(), minlength=32).tolist()
    torch.testing.assert_close(found.drawn, drawn[: measure.N_SHOWN])
    torch.testing.assert_close(found.originals, pixels[: measure.N_SHOWN])


def bounds(model: Dvae, pixels: Tensor, elbo: Elbo) -> Iterator[tuple[float, float]]:
    """Relaxed and hard bound of each picture in nats per value, from the definition."""
    for number, picture in enumerate(map_pixels(pixels)[:, None]):
        logits = model.encoder(picture).permute(0, 2, 3, 1)
        noise = uniform_rows(elbo.seed, EVALUATION + number, range(1), (4, 4, 32))
        noisy = logits - torch.log(-torch.log(noise))
        p = logits.softmax(-1)
        divergence = (p * (p.log() + math.log(32))).sum()
        relaxed = model.decoder((noisy / elbo.tau).softmax(-1).permute(0, 3, 1, 2))
        decoded = (relaxed, model.decode(noisy.argmax(-1)))
        likelihoods = [
            -pixel_nats(parameters, picture, elbo.min_log_scale, elbo.likelihood).sum() for parameters in decoded
        ]
        yield tuple(((one - divergence) / picture.numel()).item() for one in likelihoods)  # type: ignore[misc]


@pytest.mark.parametrize("likelihood", ["logit-laplace", "logit-normal"])
def test_the_bounds_are_relaxed_and_hard_with_one_noise(
    shards: Shards, monkeypatch: pytest.MonkeyPatch, likelihood: Likelihood
) -> None:
    elbo = dataclasses.replace(ELBO, likelihood=likelihood)
    model = random_model()
    with torch.no_grad():
        want = list(bounds(model, first_pictures(shards, 9, 16), elbo))
    values = HeldOut(shards, 16, ALONE, count=9).measure(model, elbo).values
    relaxed, hard = (sum(column) / 9 for column in zip(*want, strict=True))
    assert values["val/elbo_relaxed"] == pytest.approx(relaxed, rel=1e-4)
    assert values["val/elbo_hard"] == pytest.approx(hard, rel=1e-4)
    assert values["val/elbo_gap"] == pytest.approx(relaxed - hard, rel=1e-2, abs=1e-5)
    monkeypatch.setattr(measure, "N_ELBO", 3)  # of nine pictures every third
    few = HeldOut(shards, 16, ALONE, count=9).measure(model, elbo).values
    assert few["val/elbo_hard"] == pytest.approx(sum(hard for _, hard in want[::3]) / 3, rel=1e-4)


def test_at_a_low_temperature_the_bounds_are_one(shards: Shards) -> None:
    gaps = [
        HeldOut(shards, 16, ALONE).measure(random_model(), dataclasses.replace(ELBO, tau=tau)).values["val/elbo_gap"]
        for tau in (1.0, 1e-4)
    ]
    assert abs(gaps[1]) < 1e-5 < abs(gaps[0])


def test_ranks_share_the_pictures_without_gap_or_overlap(shards: Shards) -> None:
    whole = HeldOut(shards, 16, ALONE, count=7).pixels
    parts = [HeldOut(shards, 16, Place(rank, 3, torch.device("cpu")), count=7).pixels for rank in range(3)]
    assert [len(part) for part in parts] == [3, 3, 1]
    assert torch.equal(torch.cat(parts), whole)
    idle = HeldOut(shards, 16, Place(4, 5, torch.device("cpu")), count=4)
    assert len(idle.pixels) == 0 and idle.reconstructions(random_model()).shape == (0, 3, 16, 16)


def test_large_pictures_are_measured_a_few_at_a_time(shards: Shards, monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model()
    at_once = HeldOut(shards, 16, ALONE).measure(model, ELBO).values
    monkeypatch.setattr(measure, "BATCH_SIDE", 2)  # 128 / 64 pictures
    assert HeldOut(shards, 16, ALONE).measure(model, ELBO).values == pytest.approx(at_once, rel=1e-5)


class Channels(torch.nn.Module):
    """Mean red, green and blue as features."""

    def forward(self, pixels: Tensor, return_features: bool = False) -> Tensor:
        means = pixels.float().mean((2, 3))
        return means if return_features else means.softmax(-1)


def test_the_frechet_distance_of_known_gaussians_is_the_closed_form(tmp_path: Path) -> None:
    """Of diagonal covariances: |m1 - m2|^2 + sum (s1 - s2)^2."""
    torch.manual_seed(0)
    base = torch.randn(4000, 3, dtype=torch.float64)
    base = torch.linalg.qr(base - base.mean(0)).Q * math.sqrt(len(base) - 1)  # mean 0, covariance I, exactly
    (m1, s1), (m2, s2) = ([1.0, 2.0, 3.0], [1.0, 2.0, 0.5]), ([1.5, 2.0, 1.0], [2.0, 0.1, 0.5])
    one, two = (base * torch.tensor(s) + torch.tensor(m) for m, s in ((m1, s1), (m2, s2)))
    want = sum((a - b) ** 2 for a, b in zip(m1 + s1, m2 + s2, strict=True))
    assert frechet_distance(one, two) == pytest.approx(want, rel=1e-9)
    assert frechet_distance(one, one) == pytest.approx(0, abs=1e-6)
    turn = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64)).Q
    assert frechet_distance(one @ turn, two @ turn) == pytest.approx(want, rel=1e-9)


def test_features_are_those_of_the_users_network(tmp_path: Path) -> None:
    torch.jit.script(Channels()).save(str(tmp_path / "toy.pt"))
    pixels = torch.rand(70, 3, 5, 5)
    found = Features(tmp_path / "toy.pt", ALONE.device).of(pixels, ALONE)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, (pixels * 255).round().mean((2, 3)).double(), rtol=1e-5, atol=1e-4)


def test_a_file_that_is_no_network_is_named(tmp_path: Path) -> None:
    for name, content in {"none.pt": None, "text.pt": b"no network"}.items():
        if content:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=rf"fid_inception=.*{name} is no TorchScript"):
            Features(tmp_path / name, ALONE.device)
