"""The benchmark of the discrete VAE in small: every row is measured or says why not, and its counts are right."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks import dvae, dvae_sizes
from benchmarks.distributed_jobs import Row
from benchmarks.dvae import Setup, codes_rows, emoji_rows, memory_rows, rows, speed_rows
from benchmarks.dvae_sizes import SIZES, computed_gigabytes, training_flops
from tests.small import SMALL_DVAE

TINY, PUBLISHED = SIZES["tiny"], SIZES["published"]


@pytest.fixture
def setup(data: Path, tmp_path: Path) -> Setup:
    return Setup(images=data / "images", folder=tmp_path, size="tiny", preset=SMALL_DVAE, seeds=(0, 1))


def test_codes_and_pixels_are_the_published_modules(setup: Setup) -> None:
    codes, pixels = codes_rows(setup)
    assert codes.ok and pixels.ok and codes.value == 1.0
    assert not codes.note.endswith(" 1 different codes")


def test_speed_is_told_as_ratios_and_as_a_share(setup: Setup) -> None:
    step, encode, share = speed_rows(setup)
    assert all(row.value is not None and row.value > 0 for row in (step, encode, share))
    assert len(step.details["step"]) == dvae_sizes.ROUNDS and "pictures/s" in encode.note


def test_memory_is_computed_and_measured(setup: Setup) -> None:
    computed, resident = memory_rows(setup)
    assert computed.ok and resident.ok and "GB in fp16" in computed.note


def test_a_published_training_step_is_three_times_its_forward_pass() -> None:
    """2 x 290 G multiply-adds forward, and as much again for each of weights and inputs, but those of the pixels."""
    stem = 2 * 256**2 * 256 * 3 * 49  # no gradient reaches the pixels
    assert training_flops(PUBLISHED) == pytest.approx(3 * 580.3e9 - stem, rel=1e-3)


def test_computed_memory_holds_weights_gradients_and_moments_and_grows_with_what_is_kept() -> None:
    n_weights = sum(p.numel() for p in dvae_sizes.Dvae(TINY).parameters())
    whole, recomputed = (computed_gigabytes(TINY, 8, torch.float32, recompute) for recompute in (False, True))
    assert 16 * n_weights / 1e9 < recomputed < whole
    assert (
        computed_gigabytes(TINY, 8, torch.float16, False) < whole < computed_gigabytes(TINY, 16, torch.float32, False)
    )


def test_every_seed_counts(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    psnr, codes, minutes = emoji_rows(setup)
    assert "seeds (0, 1): " in psnr.note and psnr.value is not None and codes.value is not None
    assert 0 < codes.value <= 1 and minutes.ok
    assert psnr.value == pytest.approx(min(map(float, psnr.note.rpartition(": ")[2].split(","))), abs=0.01)


def test_what_cannot_be_measured_says_why_and_the_next_row_comes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(dvae.ROWS, "size/gpu", lambda setup: Row("size/gpu share", 0.4, 0.0, True, ""))
    monkeypatch.setattr("sys.argv", ["dvae", "--json", "emoji-128", "size/gpu", f"images={tmp_path}"])
    assert dvae.main() == 1
    device, gpu, emoji = map(json.loads, capsys.readouterr().out.splitlines())
    assert device["torch"] == torch.__version__ and gpu["ok"]
    assert emoji["value"] is None and not emoji["ok"] and "smalti preprocess emoji image_side=128" in emoji["note"]


def test_a_missing_peer_or_gpu_is_told(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        dvae.metadata, "version", lambda name: (_ for _ in ()).throw(dvae.metadata.PackageNotFoundError)
    )
    (peer,) = rows(["dalle-pytorch"], setup)
    assert peer.value is None and "not installed" in peer.note
    if not torch.cuda.is_available():
        (gpu,) = rows(["size/gpu"], setup)
        assert gpu.value is None and "no GPU" in gpu.note
    with pytest.raises(SystemExit, match="no row siz;"):
        dvae.chosen(["siz"])
