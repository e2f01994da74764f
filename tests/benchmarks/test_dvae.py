"""The benchmark of the discrete VAE in small: every row is measured or says why not, and its counts are right."""

import itertools
import json
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks import dvae, dvae_sizes, dvae_turns
from benchmarks.distributed_jobs import Failed, Row
from benchmarks.dvae import Setup, codes_rows, emoji_rows, memory_rows, rows, speed_rows
from benchmarks.dvae_sizes import (
    MEMORY_BATCH,
    SIZES,
    computed_gigabytes,
    made,
    mapped_pictures,
    noise_for,
    stepper,
    training_flops,
)
from cluster.manifest import write_manifest
from cluster.metrics import read_metrics
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
    assert len(step.details["step"]) == dvae_turns.ROUNDS and "pictures/s" in encode.note


@pytest.mark.parametrize("fast", ["a @ b", "kernels/linear.py"])
def test_the_share_is_of_the_faster_product(fast: str) -> None:
    """Whichever it is: the rate is that of the best round of the best product."""
    ours = {"a @ b": [0.5, 0.5], "kernels/linear.py": [0.5, 0.5], "step": [2.0, 4.0], "encode": [1.0, 1.0]}
    ours[fast] = [1.0, 0.25]
    theirs = {"step": [4.0, 4.0], "encode": [1.0, 1.0]}
    found = dvae_turns.told({"ours": ours, "theirs": theirs}, flops=10**9)
    peak = 2 * dvae_turns.MATRIX**3 / 0.25
    assert found["product"] == fast and found["gflop_s"] == peak / 1e9
    assert found["share"] == pytest.approx(10**9 / 2.0 / peak)
    assert found["step"] == [2.0, 1.0]


def test_a_program_that_ends_too_soon_is_told() -> None:
    with (
        pytest.raises(Failed, match="the process of none ended with exit code 2"),
        dvae_turns.waiting("none", "tiny") as turn,
    ):
        turn()


def test_memory_is_computed_and_measured(setup: Setup) -> None:
    """A process holds at least what is alive at once; beside it oneDNN's buffers and gaps, 0.1 GB here as measured."""
    setup.size = "small"
    computed, resident = memory_rows(setup)
    alive = computed_gigabytes(SIZES["small"], MEMORY_BATCH, torch.float32)
    assert computed.value == computed_gigabytes(SIZES["small"], MEMORY_BATCH, torch.float16)
    assert resident.value is not None and alive < resident.value < alive + 0.3
    assert "GB in fp16" in computed.note and f"computed {alive:.1f}" in resident.note


def test_more_than_16_gigabytes_are_too_many(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    found = {"computed": {"fp16": 15.0, "fp32": 20.0}, "without checkpointing, fp16": 30.0, "resident": 17.0}
    monkeypatch.setattr(dvae, "of_size", lambda setup, what: found)
    computed, resident = memory_rows(setup)
    assert computed.ok and not resident.ok and "fp16 without 30.0" in computed.note


def traced_gigabytes(recompute: bool) -> float:
    """The peak of what torch's allocator gives out in a real second step, and of what is held before it."""
    model = made(TINY, recompute_blocks=recompute)
    x, noise = mapped_pictures(TINY, MEMORY_BATCH), noise_for(TINY, MEMORY_BATCH)
    update = stepper(model, x, noise)
    update()
    model.zero_grad(set_to_none=True)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        update()
    nodes, changes = [*trace.profiler.kineto_results.experimental_event_tree()], list[tuple[int, int]]()
    while nodes:
        node = nodes.pop()
        nodes += node.children
        if size := getattr(node.extra_fields, "alloc_size", 0):
            changes.append((node.start_time_ns, size))
    held = 4 * (3 * sum(p.numel() for p in model.parameters()) + x.numel() + noise.numel())  # weights and moments
    return (held + max(itertools.accumulate(size for _, size in sorted(changes)))) / 1e9


@pytest.mark.parametrize("recompute", [True, False])
def test_computed_memory_is_that_of_a_real_step(recompute: bool) -> None:
    """But for what a convolution asks for beside its operands: 1 or 2 % were measured. A copy of weights is 9 %."""
    computed = computed_gigabytes(TINY, MEMORY_BATCH, torch.float32, recompute)
    assert computed == pytest.approx(traced_gigabytes(recompute), rel=0.04)


def test_a_published_training_step_is_three_times_its_forward_pass() -> None:
    """2 x 290 G multiply-adds forward, and as much again for each of weights and inputs, but those of the pixels.

    Of them a decoder's group makes its first 1x1 convolutions before it enlarges, at a quarter of the positions.
    """
    stem = 2 * 256**2 * 256 * 3 * 49  # no gradient reaches the pixels
    before = sum(2 * side**2 * 2 * width * (width + width // 4) for side, width in ((64, 1024), (128, 512), (256, 256)))
    assert training_flops(PUBLISHED) == pytest.approx(3 * (580.3e9 - 3 / 4 * before) - stem, rel=1e-3)


def test_computed_memory_holds_weights_gradients_and_moments_and_grows_with_what_is_kept() -> None:
    n_weights = sum(p.numel() for p in dvae_sizes.Dvae(TINY).parameters())
    whole, recomputed = (computed_gigabytes(TINY, 8, torch.float32, recompute) for recompute in (False, True))
    assert 16 * n_weights / 1e9 < recomputed < whole
    assert (
        computed_gigabytes(TINY, 8, torch.float16, False) < whole < computed_gigabytes(TINY, 16, torch.float32, False)
    )


def test_every_seed_counts(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    psnr, codes, collapse, minutes = emoji_rows(setup)
    runs = [read_metrics(setup.folder / f"seed{seed}") for seed in setup.seeds]
    last = [[line for line in run if "val/psnr_db" in line][-1] for run in runs]
    seconds = [sum(line["perf/step_seconds"] for line in run if "train/loss" in line) for run in runs]
    assert "seeds (0, 1): " in psnr.note and psnr.value == min(line["val/psnr_db"] for line in last)
    assert codes.value == min(line["val/codes_used"] for line in last)
    assert minutes.value == pytest.approx(max(seconds) / 60)
    assert collapse.ok and collapse.bar == 2 and collapse.note.startswith("2 of 2 seeds without collapse")


@pytest.mark.parametrize(("used", "perplexity"), [(0.01, 30.0), (0.9, 1.0)])
def test_a_seed_that_collapses_once_is_told(
    setup: Setup, monkeypatch: pytest.MonkeyPatch, used: float, perplexity: float
) -> None:
    """Codes of which few occur, or few occur often, if only for a while."""
    sick = {"val/codes_used": used, "val/perplexity": perplexity}
    well = {"val/codes_used": 0.9, "val/perplexity": 50.0, "val/psnr_db": 20.0}

    def trained(module: str, words: list[str], seconds: float) -> str:
        folder = next(Path(word[4:]) for word in words if word.startswith("out="))
        folder.mkdir()
        lines = [well, well | (sick if "seed=1" in words else {}), well]
        (folder / "metrics.jsonl").write_text("".join(json.dumps({"step": 0} | line) + "\n" for line in lines))
        write_manifest(folder, "dvae", {"model": {"codebook": 64}, "collapse_below": 0.02}, {}, [], {})
        return ""

    monkeypatch.setattr(dvae, "on_all_cores", trained)
    *_, collapse, _ = emoji_rows(setup)
    assert collapse.value == 1 and not collapse.ok and collapse.note.startswith("1 of 2 seeds without collapse")


def test_what_cannot_be_measured_says_why_and_the_next_row_comes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(dvae.ROWS, "size/gpu", lambda setup: Row("size/gpu share", 0.4, 0.0, True, ""))
    monkeypatch.setattr("sys.argv", ["dvae", "--json", "emoji-128", "size/gpu", f"images={tmp_path}"])
    assert dvae.main() == 1
    device, gpu, emoji = map(json.loads, capsys.readouterr().out.splitlines())
    assert device["torch"] == torch.__version__ and gpu["ok"]
    assert emoji["value"] is None and not emoji["ok"] and "smalti preprocess emoji image_side=128" in emoji["note"]


def test_a_missing_gpu_is_no_failure(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(dvae, "n_accelerators", lambda: 0)
    for words in (["size/gpu"], ["--json", "size/gpu"]):
        monkeypatch.setattr("sys.argv", ["dvae", *words])
        assert dvae.main() == 0
    line, _, row = capsys.readouterr().out.splitlines()
    assert "not measured: this machine has no GPU" in line and "MISSED" not in line
    assert json.loads(row)["value"] is None and json.loads(row)["ok"] is None


def test_a_gpu_that_fails_is_a_failure(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fails(setup: Setup, what: str) -> None:
        raise Failed("out of memory")

    monkeypatch.setattr(dvae, "n_accelerators", lambda: 1)
    monkeypatch.setattr(dvae, "of_size", fails)
    monkeypatch.setattr("sys.argv", ["dvae", "size/gpu"])
    assert dvae.main() == 1
    assert "MISSED  out of memory" in capsys.readouterr().out


def test_a_missing_peer_is_told(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        dvae.metadata, "version", lambda name: (_ for _ in ()).throw(dvae.metadata.PackageNotFoundError)
    )
    (peer,) = rows(["dalle-pytorch"], setup)
    assert peer.value is None and "not installed" in peer.note
    with pytest.raises(SystemExit, match="no row siz;"):
        dvae.chosen(["siz"])
