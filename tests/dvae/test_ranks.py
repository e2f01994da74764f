"""Three ranks train as one process does, keep one ledger, and a run goes on bit for bit, or on fewer ranks."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from cluster.ledger import NAME as LEDGER
from cluster.metrics import read_metrics
from cluster.process import Place
from cluster.weights import WEIGHTS
from dvae.health import COUNTS
from dvae.train import train
from dvae.trainer import BESIDE
from tests.dvae.ranks_job import STEPS, STOP_AFTER, VARIANTS, settings

RANKS = 3  # sums of two numbers have no order that could be lost
ROUNDING = 1e-5  # float32 sums in another order, over ten updates of Adam
ALONE = Place(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def runs(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of runs on three ranks, out of one job, and `alone`, the same in this process."""
    folder = tmp_path_factory.mktemp("ranks")
    launcher = ["-m", "torch.distributed.run", f"--nproc-per-node={RANKS}", "--standalone"]
    command = [sys.executable, *launcher, "-m", "tests.dvae.ranks_job", str(data), str(folder)]
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300, cwd=root)
    assert done.returncode == 0, done.stderr[-3000:]
    train(settings(data, folder / "alone", **VARIANTS["plain"]), ALONE)
    return folder


def records(run: Path, drop: str = "perf/") -> list[dict[str, Any]]:
    return [{key: value for key, value in line.items() if not key.startswith(drop)} for line in read_metrics(run)]


def test_ranks_train_as_one_process(runs: Path) -> None:
    ours, alone = records(runs / "plain"), records(runs / "alone")
    assert [line.keys() for line in ours] == [line.keys() for line in alone]
    assert len([line for line in ours if "train/loss" in line]) == STEPS
    for here, there in zip(ours, alone, strict=True):
        counted = ("vae/codes_used_in_batch", "vae/perplexity_in_batch", "val/codes_used", "val/perplexity")
        for key in here.keys() - {*counted}:
            assert here[key] == pytest.approx(there[key], rel=ROUNDING, abs=ROUNDING), key
        for key in here.keys() & {*counted}:  # a code can change where two are as good
            assert here[key] == pytest.approx(there[key], rel=0.02), key
    weights, wanted = (load_file(runs / name / WEIGHTS) for name in ("plain", "alone"))
    for name in wanted:
        torch.testing.assert_close(weights[name], wanted[name], rtol=ROUNDING, atol=ROUNDING)


def test_the_released_weights_are_the_average(runs: Path) -> None:
    (saved,) = (runs / "plain" / "checkpoints").glob(f"global_step{STEPS}")
    average = torch.load(saved / BESIDE, weights_only=True)["average"]
    weights = load_file(runs / "plain" / WEIGHTS)
    last = torch.load(saved / "state.pt", weights_only=True)["model"]
    assert all(torch.equal(weights[name], average[name]) for name in weights)
    assert not torch.equal(last["encoder.head.weight"], weights["encoder.head.weight"])


@pytest.mark.parametrize("name", VARIANTS)
def test_a_resumed_run_has_the_same_bits(runs: Path, name: str) -> None:
    once, twice = runs / name, runs / f"{name}-resumed"
    assert records(once) == records(twice)
    for file in (WEIGHTS, LEDGER, COUNTS):
        assert (once / file).read_bytes() == (twice / file).read_bytes(), file


def test_checkpointing_changes_no_bit_of_a_run(runs: Path) -> None:
    assert (runs / "plain" / WEIGHTS).read_bytes() == (runs / "checkpointed" / WEIGHTS).read_bytes()


def test_the_ledger_is_that_of_one_process(runs: Path) -> None:
    assert (runs / "plain" / LEDGER).read_bytes() == (runs / "alone" / LEDGER).read_bytes()


def test_what_three_ranks_left_goes_on_in_one_process(data: Path, runs: Path) -> None:
    before = len([line for line in records(runs / "left") if "train/loss" in line])
    train(settings(data, runs / "left", **VARIANTS["plain"]), ALONE)
    assert before == STOP_AFTER
    for here, there in zip(records(runs / "left"), records(runs / "plain"), strict=True):
        if "train/loss" in here:
            assert here["train/loss"] == pytest.approx(there["train/loss"], rel=ROUNDING)
    assert (runs / "left" / LEDGER).read_bytes() == (runs / "plain" / LEDGER).read_bytes()


def test_the_loss_scale_is_kept_in_checkpoints(runs: Path) -> None:
    scales = [
        torch.load(runs / name / "checkpoints" / f"global_step{STEPS}" / BESIDE, weights_only=True)["scaler"]
        for name in ("fp16", "fp16-resumed")
    ]
    assert scales[0] == scales[1] and scales[0]["_growth_tracker"] == STEPS  # updates since the scale changed
