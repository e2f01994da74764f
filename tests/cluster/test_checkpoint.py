"""Checkpoints: the newest whole one is found whatever happened to the others."""

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cluster.checkpoint import SEAL, Checkpoints, find_checkpoint, verify
from cluster.manifest import FolderError
from cluster.process import Place


class Killed(BaseException):
    """Stands for a kill: nothing in the program may catch it."""


def writer(step: int) -> Callable[[Path, str], None]:
    def write(folder: Path, tag: str) -> None:
        (folder / tag / "rank0").mkdir()
        (folder / tag / "weights.pt").write_bytes(f"weights of {step}".encode() * 20)
        (folder / tag / "rank0" / "moments.pt").write_bytes(f"moments of {step}".encode() * 20)

    return write


def fill(folder: Path, place: Place, *steps: int, keep_last: int = 9) -> Checkpoints:
    checkpoints = Checkpoints(folder, place, keep_last)
    for step in steps:
        checkpoints.save(step, {"step was": step}, writer(step))
    return checkpoints


def test_the_newest_by_number_is_restored_with_what_was_said_of_it(tmp_path: Path, place: Place) -> None:
    checkpoints = fill(tmp_path, place, 9, 10, 100)
    assert checkpoints.newest_valid() == (100, tmp_path / "global_step100", {"step was": 100})
    assert (tmp_path / "latest").read_text() == "global_step100"
    assert (tmp_path / "global_step100/rank0/moments.pt").read_bytes().startswith(b"moments of 100")
    assert not (tmp_path / "unfinished").exists()


def test_no_checkpoint_is_none(tmp_path: Path, place: Place) -> None:
    assert Checkpoints(tmp_path / "none", place, 2).newest_valid() is None


def flip_first_byte(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(bytes([data[0] ^ 1]) + data[1:])


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "flipped": flip_first_byte,
    "missing": Path.unlink,
    "cut": lambda path: os.truncate(path, path.stat().st_size - 2),
    "empty": lambda path: os.truncate(path, 0),
}


@pytest.mark.parametrize("name", ["weights.pt", "rank0/moments.pt", SEAL])
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_passed_over_and_named(
    tmp_path: Path, place: Place, capsys: pytest.CaptureFixture[str], damage: str, name: str
) -> None:
    checkpoints = fill(tmp_path, place, 1, 2, 3)
    DAMAGE[damage](tmp_path / "global_step3" / name)
    found = checkpoints.newest_valid()
    assert found is not None and found[0] == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "global_step3" in said and name in said


def test_the_last_good_one_is_found_behind_many_bad_ones(tmp_path: Path, place: Place) -> None:
    checkpoints = fill(tmp_path, place, 1, 2, 3, 4)
    for step in (2, 3, 4):
        flip_first_byte(tmp_path / f"global_step{step}" / "weights.pt")
    found = checkpoints.newest_valid()
    assert found is not None and found[0] == 1
    flip_first_byte(tmp_path / "global_step1" / "weights.pt")
    assert checkpoints.newest_valid() is None


def test_a_flip_anywhere_in_the_seal_breaks_no_restore(tmp_path: Path, place: Place) -> None:
    checkpoints = fill(tmp_path, place, 1, 2)
    seal = tmp_path / "global_step2" / SEAL
    whole = seal.read_bytes()
    for at in range(len(whole)):
        seal.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        found = checkpoints.newest_valid()
        assert found is not None and found[0] in (1, 2)


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("PytorchStreamWriter failed\ntrace")]
)
def test_a_save_that_fails_says_so_in_one_line_and_leaves_earlier_ones(
    tmp_path: Path, place: Place, error: Exception, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoints = fill(tmp_path, place, 1)

    def fail_half_way(folder: Path, tag: str) -> None:
        (folder / tag / "weights.pt").write_bytes(b"half")
        raise error

    assert not checkpoints.save(2, {}, fail_half_way)
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "could not save" in said and "global_step2" in said and "untouched" in said
    assert not (tmp_path / "unfinished").exists()
    assert checkpoints.newest_valid() == (1, tmp_path / "global_step1", {"step was": 1})
    assert checkpoints.save(2, {"again": True}, writer(2))
    assert checkpoints.newest_valid() == (2, tmp_path / "global_step2", {"again": True})


def test_a_seal_that_fails_is_a_save_that_fails(
    tmp_path: Path, place: Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoints = fill(tmp_path, place, 1)

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        assert not checkpoints.save(2, {}, writer(2))
    assert "No space left" in capsys.readouterr().err
    assert checkpoints.newest_valid() == (1, tmp_path / "global_step1", {"step was": 1})
    assert checkpoints.save(2, {}, writer(2)) and verify(tmp_path / "global_step2") is None


def test_a_save_that_would_not_fit_is_not_begun(
    tmp_path: Path, place: Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoints = fill(tmp_path, place, 1)
    size = sum(path.stat().st_size for path in (tmp_path / "global_step1").rglob("*"))
    written = []

    def write(folder: Path, tag: str) -> None:
        written.append(tag)
        writer(2)(folder, tag)

    for free, fits in ((size - 1, False), (size, True)):
        monkeypatch.setattr("shutil.disk_usage", lambda path, free=free: SimpleNamespace(free=free))
        assert checkpoints.save(2, {}, write) == fits
        assert bool(written) == fits
    assert "the newest one has 0 MiB" in capsys.readouterr().err


def test_multiples_of_a_step_are_kept_for_good(tmp_path: Path, place: Place) -> None:
    checkpoints = Checkpoints(tmp_path, place, 1, keep_every=4)
    for step in (2, 4, 6, 8, 10):
        checkpoints.save(step, {}, writer(step))
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "global_step10",
        "global_step4",
        "global_step8",
        "latest",
    ]


def test_a_kill_at_any_move_costs_at_most_the_save_in_progress(
    tmp_path: Path, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every file operation of a save in turn is the last one that the program does."""
    real = {name: getattr(os, name) for name in ("mkdir", "fsync", "rename", "replace")}
    for moves in range(1, 100):
        folder = tmp_path / str(moves)
        checkpoints = fill(folder, place, 1, 2, keep_last=1)
        left = moves

        def counted(name: str) -> Callable[..., Any]:
            def act(*words: Any, **more: Any) -> Any:
                nonlocal left
                left -= 1
                if left < 0:
                    raise Killed
                return real[name](*words, **more)

            return act

        for name in real:
            monkeypatch.setattr(os, name, counted(name))
        try:
            checkpoints.save(3, {}, writer(3))
            killed = False
        except Killed:
            killed = True
        monkeypatch.undo()
        found = checkpoints.newest_valid()
        assert found is not None and found[0] in ((2, 3) if killed else (3,))
        checkpoints.save(4, {}, writer(4))
        assert verify(folder / "global_step4") is None and (folder / "latest").read_text() == "global_step4"
        if not killed:
            assert moves > 5
            return
    raise AssertionError("no save was ever finished")


def test_a_kill_while_a_step_is_saved_again_leaves_one_of_the_two(
    tmp_path: Path, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is no other checkpoint to fall back on."""
    real = {name: getattr(os, name) for name in ("mkdir", "fsync", "rename", "replace", "rmdir", "unlink")}
    for moves in range(1, 100):
        folder = tmp_path / str(moves)
        checkpoints = fill(folder, place, 3, keep_last=1)
        left = moves

        def counted(name: str) -> Callable[..., Any]:
            def act(*words: Any, **more: Any) -> Any:
                nonlocal left
                left -= 1
                if left < 0:
                    raise Killed
                return real[name](*words, **more)

            return act

        for name in real:
            monkeypatch.setattr(os, name, counted(name))
        try:
            checkpoints.save(3, {"again": True}, writer(5))
            killed = False
        except Killed:
            killed = True
        monkeypatch.undo()
        found = checkpoints.newest_valid()
        assert found is not None and found[0] == 3
        assert found[2] == {"again": True} or killed
        whose = b"weights of 5" if found[2] == {"again": True} else b"weights of 3"
        assert (found[1] / "weights.pt").read_bytes().startswith(whose)
        checkpoints.save(4, {}, writer(4))
        assert sorted(path.name for path in folder.iterdir()) == ["global_step4", "latest"]
        if not killed:
            assert moves > 8
            return
    raise AssertionError("no save was ever finished")


def test_ranks_verify_together(tmp_path: Path, place: Place) -> None:
    """Each file's digest is compared by one of them, its size by all."""
    fill(tmp_path, place, 1)
    folder = tmp_path / "global_step1"
    names = list(json.loads((folder / SEAL).read_text())["files"])
    for number, name in enumerate(names):
        flip_first_byte(folder / name)
        assert [verify(folder, share, 3) is not None for share in range(3)] == [share == number for share in range(3)]
        flip_first_byte(folder / name)


def test_a_checkpoint_is_found_by_its_step(tmp_path: Path, place: Place) -> None:
    fill(tmp_path / "checkpoints", place, 1, 2)
    assert find_checkpoint(tmp_path).step == 2
    assert find_checkpoint(tmp_path, 1).about == {"step was": 1}
    flip_first_byte(tmp_path / "checkpoints" / "global_step2" / "weights.pt")
    assert find_checkpoint(tmp_path).step == 1
    with pytest.raises(FolderError, match="no checkpoint of step 2 that verifies .steps there: 1, 2."):
        find_checkpoint(tmp_path, 2)


def test_rank_0_must_write(tmp_path: Path, place: Place) -> None:
    with pytest.raises(ValueError, match="rank 0"):
        Checkpoints(tmp_path, place, 1, writers=[1, 2])


def test_only_the_last_are_kept(tmp_path: Path, place: Place) -> None:
    fill(tmp_path, place, 8, 9, 10, 11, keep_last=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["global_step10", "global_step11", "latest"]


def test_saving_a_step_again_replaces_it(tmp_path: Path, place: Place) -> None:
    checkpoints = fill(tmp_path, place, 1)
    checkpoints.save(1, {"second": True}, writer(7))
    assert checkpoints.newest_valid() == (1, tmp_path / "global_step1", {"second": True})
    assert (tmp_path / "global_step1/weights.pt").read_bytes().startswith(b"weights of 7")
