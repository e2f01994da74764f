"""`smalti checkpoint`: what is there, what is bad, and what goes; the newest good one never does."""

import os
from pathlib import Path

import pytest

from cluster.checkpoint import Checkpoints
from cluster.command import run_command
from cluster.inspect_checkpoints import COMMAND
from cluster.process import Place


@pytest.fixture
def run(tmp_path: Path, place: Place) -> Path:
    """A run folder with checkpoints after 2, 4, 6 and 8 steps."""
    checkpoints = Checkpoints(tmp_path / "run" / "checkpoints", place, keep_last=9)
    for step in (2, 4, 6, 8):
        checkpoints.save(step, {}, lambda folder, tag: (folder / tag / "weights.pt").write_bytes(b"x" * 2**20) and None)
    return tmp_path / "run"


def steps(run: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("global_step")) for path in (run / "checkpoints").glob("global_step*"))


def cut(run: Path, step: int) -> None:
    os.truncate(run / "checkpoints" / f"global_step{step}" / "weights.pt", 5)


def test_ls_shows_step_size_and_the_latest(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "checkpoints" / "global_step4" / "smalti_manifest.json").unlink()
    assert run_command(COMMAND, ["ls", str(run)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines] == ["2", "4", "6", "8"]
    assert "1.0 MiB" in lines[0] and lines[0].endswith("sealed")
    assert lines[1].endswith("unfinished") and lines[3].endswith("sealed, latest")


def test_a_checkpoint_whose_replacement_was_killed_is_one_like_any_other(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    newest = run / "checkpoints" / "global_step8"
    newest.rename(newest.with_name("global_step8.old"))
    assert run_command(COMMAND, ["ls", str(run)]) == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith("sealed, to be replaced by a new save of this step")
    assert run_command(COMMAND, ["prune", str(run), "keep_last=1", "yes=true"]) == 0
    assert [path.name for path in (run / "checkpoints").glob("global*")] == ["global_step8.old"]


def test_verify_names_the_bad_ones_and_what_would_be_restored(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(COMMAND, ["verify", str(run)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "global_step8: good"
    cut(run, 8)
    assert run_command(COMMAND, ["verify", str(run)]) == 1
    told = capsys.readouterr()
    assert "global_step8: weights.pt was cut or changed" in told.out and "global_step6: good" in told.out
    assert "1 of 4 checkpoints" in told.err and "global_step6 would be restored" in told.err


def test_prune_shows_first_and_removes_when_told(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(COMMAND, ["prune", str(run), "keep_last=1", "keep_every=4"]) == 0
    said = capsys.readouterr().out
    assert said.count("would remove") == 2 and "nothing was removed" in said and steps(run) == [2, 4, 6, 8]
    assert run_command(COMMAND, ["prune", str(run), "keep_last=1", "keep_every=4", "yes=true"]) == 0
    assert steps(run) == [4, 8]


def test_prune_never_takes_the_newest_good_one(run: Path) -> None:
    cut(run, 6)
    cut(run, 8)
    assert run_command(COMMAND, ["prune", str(run), "keep_last=1", "--yes"]) == 0
    assert steps(run) == [4, 8]


def test_a_folder_without_checkpoints_is_said_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(COMMAND, ["ls", str(tmp_path)]) == 1
    assert capsys.readouterr().err.count("\n") == 1
    assert run_command(COMMAND, ["shred", str(tmp_path)]) == 2
