"""Training through DeepSpeed: any stage and world size agrees, a killed run resumes bit for bit."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cluster.metrics import read_metrics
from cluster.watch import REQUEUE
from tests.small import SMALL_TRAIN, smalti


def losses(run: Path) -> list[float]:
    return [record["train/loss"] for record in read_metrics(run) if "train/loss" in record]


def train(words: list[str], out: Path, processes: int = 1) -> Path:
    launcher = ["-m", "torch.distributed.run", f"--nproc-per-node={processes}", "--standalone"] if processes > 1 else []
    command = [sys.executable, *launcher, "-m", "pretrain.train", *words, f"out={out}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    return out


@pytest.fixture(scope="module")
def plain(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The undisturbed one-process run that the others are held against."""
    words = [*SMALL_TRAIN, f"tokens={tiny}/data/tokens", f"vocab={tiny}/data/vocab"]
    return train([*words, "zero_stage=1"], tmp_path_factory.mktemp("plain") / "run")


def test_a_run_learns_and_is_released(plain: Path) -> None:
    logged = losses(plain)
    assert len(logged) == 12 and logged[-1] < logged[0] - 0.1
    weights = load_file(plain / "model.safetensors")
    assert all(tensor.isfinite().all() for tensor in weights.values())
    counts = json.loads((plain / "manifest.json").read_text())["counts"]
    assert counts["steps"] == 12 and 0 < counts["val/image_loss"] < 6


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_two_processes_at_every_zero_stage_equal_one(
    stage: int, plain: Path, train_words: list[str], tmp_path: Path
) -> None:
    sharded = train([*train_words, f"zero_stage={stage}"], tmp_path / "run", processes=2)
    assert losses(sharded) == pytest.approx(losses(plain), rel=1e-5)
    want, got = load_file(plain / "model.safetensors"), load_file(sharded / "model.safetensors")
    assert want.keys() == got.keys()
    for name in want:
        torch.testing.assert_close(got[name], want[name], atol=2e-5, rtol=1e-4)


def test_a_killed_run_resumes_bit_for_bit(plain: Path, train_words: list[str], tmp_path: Path) -> None:
    out = tmp_path / "run"
    words = [*train_words, "zero_stage=1", f"out={out}"]
    process = subprocess.Popen([sys.executable, "-m", "pretrain.train", *words], stderr=subprocess.DEVNULL)
    until = time.monotonic() + 60
    while not (out / "checkpoints" / "latest").is_file() and time.monotonic() < until:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert len(losses(out)) < 12
    resumed = smalti("train", *words)
    assert "resumed at step" in resumed.stderr
    assert losses(out) == losses(plain)
    want, got = load_file(plain / "model.safetensors"), load_file(out / "model.safetensors")
    assert all(torch.equal(want[name], got[name]) for name in want)


def test_a_run_goes_on_with_other_processes_and_another_zero_stage(train_words: list[str], tmp_path: Path) -> None:
    """One process at stage 1, two at stage 3, four as two nodes of two, and one again."""
    settings = [*train_words, "optim.average_every=2", "optim.schedule=constant"]
    want, out = train(settings, tmp_path / "undisturbed"), tmp_path / "run"
    train([*settings, "zero_stage=1", "n_steps=3"], out)
    for n_steps, processes, words in (
        (6, 2, ["zero_stage=3"]),
        (9, 4, ["zero_stage=3", "zero_shards=2"]),
        (12, 1, ["zero_stage=2"]),
    ):
        allowed = ["allow_change=n_steps,zero_shards", f"n_steps={n_steps}"]
        train([*settings, *words, *allowed], out, processes)
    assert losses(out) == pytest.approx(losses(want), rel=1e-5)
    assert (out / "ledger.jsonl").read_bytes() == (want / "ledger.jsonl").read_bytes()
    got = load_file(out / "model.safetensors")
    for name, tensor in load_file(want / "model.safetensors").items():
        torch.testing.assert_close(got[name], tensor, atol=2e-5, rtol=1e-4)


def test_a_stop_signal_saves_and_the_same_command_goes_on(plain: Path, train_words: list[str], tmp_path: Path) -> None:
    out = tmp_path / "run"
    words = [*train_words, "zero_stage=1", "save_every=1000", f"out={out}"]
    process = subprocess.Popen([sys.executable, "-m", "pretrain.train", *words], stderr=subprocess.PIPE, text=True)
    until = time.monotonic() + 60
    while not losses(out) and time.monotonic() < until:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == REQUEUE and "saved at step" in said and "Traceback" not in said
    smalti("train", *words)
    assert losses(out) == losses(plain)


def test_a_time_limit_saves_and_asks_to_be_started_again(plain: Path, train_words: list[str], tmp_path: Path) -> None:
    out = tmp_path / "run"
    words = [*train_words, "zero_stage=1", f"out={out}"]
    stopped = smalti("train", *words, "stop_after_minutes=1e-9", check=False)
    assert stopped.returncode == REQUEUE and "exit code 75" in stopped.stderr and len(losses(out)) == 1
    smalti("train", *words, "stop_after_minutes=60")
    assert losses(out) == losses(plain)


def test_a_finished_run_is_not_run_again(plain: Path, train_words: list[str]) -> None:
    before = (plain / "model.safetensors").stat().st_mtime_ns
    again = smalti("train", *train_words, "zero_stage=1", f"out={plain}")
    assert "finished already" in again.stdout
    assert (plain / "model.safetensors").stat().st_mtime_ns == before


def test_another_architecture_is_refused_by_name(plain: Path, train_words: list[str]) -> None:
    refused = smalti("train", *train_words, "zero_stage=1", "model.n_layers=3", f"out={plain}", check=False)
    assert refused.returncode == 1
    assert "model.n_layers: 2 there, 3 here" in refused.stderr and "Traceback" not in refused.stderr


def test_a_setting_may_change_on_resume_if_it_is_named(plain: Path, train_words: list[str], tmp_path: Path) -> None:
    out = tmp_path / "run"
    words = [*train_words, "zero_stage=1", f"out={out}"]
    smalti("train", *words, "stop_after_minutes=1e-9", check=False)
    refused = smalti("train", *words, "optim.clip=0.5", check=False)
    assert refused.returncode == 1 and "optim.clip: 1.0 there, 0.5 here" in refused.stderr
    unknown = smalti("train", *words, "--allow-change", "optim.clop", check=False)
    assert unknown.returncode == 2 and "allow_change names optim.clop" in unknown.stderr
    changed = smalti("train", *words, "optim.clip=0.5", "--allow-change", "optim.clip")
    assert "another setting, optim.clip: 1.0 there, 0.5 here" in changed.stdout
    assert losses(out)[0] == losses(plain)[0] and len(losses(out)) == 12


def test_a_finished_run_goes_on_to_more_steps_if_that_is_allowed(
    plain: Path, train_words: list[str], tmp_path: Path
) -> None:
    out = shutil.copytree(plain, tmp_path / "run")
    words = [*train_words, "zero_stage=1", "n_steps=14", f"out={out}"]
    assert "n_steps: 12 there, 14 here" in smalti("train", *words, check=False).stderr
    smalti("train", *words, "allow_change=n_steps")
    assert losses(out)[:12] == losses(plain) and len(losses(out)) == 14
    assert json.loads((out / "manifest.json").read_text())["counts"]["steps"] == 14
