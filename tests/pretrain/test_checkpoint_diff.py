"""`smalti checkpoint diff`: what differs is named, whoever wrote it; what does not is not."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cluster.checkpoint import Checkpoints
from cluster.command import run_command
from cluster.process import Place
from cluster.weights import save_state
from pretrain.checkpoint_diff import COMMAND, compare
from tests.pretrain.zero_files import write_zero


def weights(change: dict[str, Any]) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    first = {"a.weight": torch.randn(6, 5, generator=generator), "a.bias": torch.randn(3, generator=generator)}
    second = {"b.weight": torch.randn(9, generator=generator)}
    for name, (at, value) in change.items():
        next(group for group in (first, second) if name in group)[name].view(-1)[at] += value
    return [first, second]


def make_run(
    folder: Path, place: Place, stage: int, n_ranks: int, lr: float = 0.1, dvae: str = "d", **change: Any
) -> Path:
    """A run with checkpoints after 2 and 4 steps, which differ in one bias."""
    checkpoints = Checkpoints(folder / "checkpoints", place, 9)
    for step in (2, 4):
        moved = {name.replace("_", "."): value for name, value in change.items()}
        moved |= {"a.bias": (1, 1.0)} if step == 2 else {}
        about = {"settings": {"optim": {"lr": lr}}, "made_from": {"dvae": dvae}}

        def write(part: Path, tag: str, moved: dict[str, Any] = moved) -> None:
            write_zero(part / tag, weights(moved), stage, n_ranks)

        assert checkpoints.save(step, about, write)
    return folder


def test_checkpoints_of_other_layouts_do_not_differ(
    tmp_path: Path, place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    one, other = make_run(tmp_path / "one", place, 1, 2), make_run(tmp_path / "other", place, 3, 4)
    assert run_command(COMMAND, [str(one), f"other={other}"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "no difference"


def test_what_differs_is_named_with_its_size(tmp_path: Path, place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    one = make_run(tmp_path / "one", place, 2, 2)
    other = make_run(tmp_path / "other", place, 3, 2, lr=0.2, dvae="e", b_weight=(4, 100.0))
    assert run_command(COMMAND, [str(one), f"other={other}"]) == 1
    told = capsys.readouterr()
    lines = told.out.splitlines()[1:]
    assert lines[0] == "setting optim.lr: 0.1 there, 0.2 here" and lines[1] == "input dvae: 'd' there, 'e' here"
    assert "b.weight (weight): 1 of 9 differ, by at most 100 (" in told.out
    assert "b.weight (exp_avg): 1 of 9 differ\n" in told.out  # int16 codes: how far apart means nothing
    assert "b.weight (exp_avg_sq)" in told.out and "a.weight" not in told.out
    assert "2 settings and inputs and 3 of" in told.err


def test_two_steps_of_a_run_are_compared(tmp_path: Path, place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "run", place, 1, 1)
    assert run_command(COMMAND, [str(run), "step=2", "other_step=4"]) == 1
    told = capsys.readouterr()
    assert (
        "(step 2)" in told.out
        and "(step 4)" in told.out
        and "a.bias (weight): 1 of 3 differ, by at most 1 (" in told.out
    )
    assert run_command(COMMAND, [str(run), "step=3"]) == 1
    assert "no checkpoint of step 3" in capsys.readouterr().err


def test_runs_of_one_process_are_compared_too(tmp_path: Path, place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    """Of the dVAE and the scorer, whose state is one file."""
    for name, value in (("one", 1.0), ("other", 1.5)):
        model = torch.nn.Linear(2, 2)
        torch.nn.init.constant_(model.weight, value)
        torch.nn.init.zeros_(model.bias)
        optimizer = torch.optim.AdamW(model.parameters())
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()
        about = {"settings": {}, "made_from": {}}
        write = lambda part, tag, model=model, optimizer=optimizer: save_state(part / tag, model, optimizer)  # noqa: E731
        assert Checkpoints(tmp_path / name / "checkpoints", place, 1).save(1, about, write)
    assert run_command(COMMAND, [str(tmp_path / "one"), f"other={tmp_path / 'other'}"]) == 1
    told = capsys.readouterr()
    assert "model.weight: 4 of 4 differ, by at most 0.5 (" in told.out and "model.bias" not in told.out
    assert "optimizer.state" not in told.out  # the gradients were alike


def lazily(**tensors: Tensor) -> dict[str, Any]:
    return {name: lambda tensor=tensor: tensor for name, tensor in tensors.items()}


def test_shapes_kinds_and_missing_ones_differ_and_nan_equals_nan() -> None:
    nan = torch.tensor([float("nan"), 1.0])
    one = lazily(same=nan, shape=torch.ones(2), kind=torch.ones(2), mine=nan, small=torch.tensor([1.0, 2.0]))
    other = lazily(same=nan, shape=torch.ones(3), kind=torch.ones(2).int(), small=torch.tensor([1.0, 1.9]), yours=nan)
    lines, count = compare(one, other)
    assert count == 6
    assert lines == [
        "shape: float32 (2,) there, float32 (3,) here",
        "kind: float32 (2,) there, int32 (2,) here",
        "mine: only in the first",
        "yours: only in the second",
        "small: 1 of 2 differ, by at most 0.1 (0.05 of max)",
    ]
    lines, _ = compare(lazily(x=torch.tensor([float("inf"), 0.0])), lazily(x=torch.tensor([1.0, 0.0])))
    assert lines[0].startswith("x: 1 of 2 differ, by at most inf")


def test_a_long_list_is_cut(tmp_path: Path, place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    for name, value in (("one", 0.0), ("other", 1.0)):
        state = {"model": {f"weight{number}": torch.full((2,), value) for number in range(60)}}
        write = lambda part, tag, state=state: torch.save(state, part / tag / "state.pt")  # noqa: E731
        about = json.loads('{"settings": {}, "made_from": {}}')
        assert Checkpoints(tmp_path / name / "checkpoints", place, 1).save(1, about, write)
    assert run_command(COMMAND, [str(tmp_path / "one"), f"other={tmp_path / 'other'}"]) == 1
    told = capsys.readouterr()
    assert "... and 20 more tensors" in told.out and "60 of 60 tensors differ" in told.err
