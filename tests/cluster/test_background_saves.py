"""Saves that go on in the background, and by several ranks: nothing waits, nothing hangs, nothing half is sealed."""

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.checkpoint import Checkpoints, verify
from cluster.process import Place

JOB = Path(__file__).with_name("checkpoint_job.py")


def take(checkpoints: Checkpoints, state: dict[str, Any]) -> Callable[[Path, str], None]:
    """Gives a state to the writer, as DeepSpeed does."""
    return lambda folder, tag: checkpoints.writer.save(state, str(folder / tag / "state.pt"))


def test_what_training_changes_after_a_save_began_is_not_in_it(
    tmp_path: Path, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, real = threading.Event(), os.fsync
    checkpoints = Checkpoints(tmp_path, place, 9)
    state = {"weights": torch.zeros(1000), "groups": [{"lr": 0.1}]}
    monkeypatch.setattr(os, "fsync", lambda number: (gate.wait(10), real(number))[1])
    assert checkpoints.save(1, {"about": 1}, take(checkpoints, state), background=True)
    state["weights"] += 1
    state["groups"][0]["lr"] = 0.2
    assert not (tmp_path / "global_step1").exists() and checkpoints.saved_step == -1
    gate.set()
    assert checkpoints.wait() and checkpoints.saved_step == 1
    read = torch.load(tmp_path / "global_step1" / "state.pt", weights_only=True)
    assert not read["weights"].any() and read["groups"] == [{"lr": 0.1}]
    assert checkpoints.newest_valid() == (1, tmp_path / "global_step1", {"about": 1})


def test_training_waits_for_the_copy_and_not_for_the_disk(
    tmp_path: Path, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk stands still until the gate opens; only the second save, which waits for the first, can notice."""
    gate, real = threading.Event(), os.fsync
    monkeypatch.setattr(os, "fsync", lambda number: (gate.wait(10), real(number))[1])
    checkpoints = Checkpoints(tmp_path, place, 9)
    checkpoints.save(1, {}, take(checkpoints, {"weights": torch.zeros(1000)}), background=True)
    assert not gate.is_set()
    threading.Timer(0.2, gate.set).start()
    checkpoints.save(2, {}, take(checkpoints, {"weights": torch.zeros(1000)}), background=True)
    assert gate.is_set() and checkpoints.stall_seconds > 0.1
    assert checkpoints.wait()
    assert verify(tmp_path / "global_step1") is None and verify(tmp_path / "global_step2") is None


def test_the_memory_of_a_snapshot_serves_the_next(tmp_path: Path, place: Place) -> None:
    checkpoints = Checkpoints(tmp_path, place, 1)
    sizes = set()
    for step in range(1, 6):
        state = {"weights": torch.full((300, 1000), float(step)), "codes": torch.ones(77, dtype=torch.int16)}
        checkpoints.save(step, {}, take(checkpoints, state), background=True)
        checkpoints.wait()
        sizes.add(checkpoints.writer.memory.n_bytes)
        read = torch.load(tmp_path / f"global_step{step}" / "state.pt", weights_only=True)
        assert torch.equal(read["weights"], state["weights"]) and torch.equal(read["codes"], state["codes"])
    assert len(sizes) == 1


class Unwritable:
    def __reduce__(self) -> str:
        raise TypeError("not to be written\nat all")


@pytest.mark.parametrize(
    ("state", "broken", "error"),
    [
        ({"weights": torch.zeros(9), "odd": Unwritable()}, "", None),
        ({"weights": torch.zeros(9)}, "os.fsync", OSError(errno.ENOSPC, "No space left on device")),
        ({"weights": torch.zeros(9)}, "torch.save", RuntimeError("PytorchStreamWriter failed\nand a trace")),
    ],
)
def test_a_save_that_fails_in_the_background_stops_nothing(
    tmp_path: Path,
    place: Place,
    state: dict[str, Any],
    broken: str,
    error: Exception,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """An object that nobody thought of, a full disk, and what torch makes of one."""
    checkpoints = Checkpoints(tmp_path, place, 9)
    assert checkpoints.save(1, {"step was": 1}, take(checkpoints, {"weights": torch.zeros(9)}))

    def fail(*_: Any) -> None:
        raise error

    with monkeypatch.context() as patch:
        if broken:
            patch.setattr(broken, fail)
        assert checkpoints.save(2, {}, take(checkpoints, state), background=True)
        assert not checkpoints.wait() and checkpoints.saved_step == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "could not save" in said and "untouched" in said
    assert checkpoints.newest_valid() == (1, tmp_path / "global_step1", {"step was": 1})
    assert not (tmp_path / "unfinished").exists()
    assert checkpoints.save(2, {}, take(checkpoints, {"weights": torch.zeros(9)}), background=True)
    assert checkpoints.wait() and checkpoints.saved_step == 2


def test_a_restore_waits_for_the_save_under_way(tmp_path: Path, place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda number: (time.sleep(0.05), real(number))[1])
    checkpoints = Checkpoints(tmp_path, place, 9)
    checkpoints.save(5, {}, take(checkpoints, {"weights": torch.zeros(9)}), background=True)
    found = checkpoints.newest_valid()
    assert found is not None and found[0] == 5


SAVES_FOR_EVER = """
import sys, torch
from pathlib import Path
from cluster.checkpoint import Checkpoints
from cluster.process import Place
checkpoints = Checkpoints(Path(sys.argv[1]), Place(0, 1, torch.device("cpu")), 1)
for step in range(int(sys.argv[2]), 10**6):
    state = {"weights": torch.full((2**20,), float(step))}
    checkpoints.save(step, {}, lambda folder, tag: checkpoints.writer.save(state, f"{folder}/{tag}/s.pt"), True)
    print(checkpoints.saved_step, flush=True)
"""


def test_a_process_killed_while_it_saves_loses_no_sealed_checkpoint(tmp_path: Path, place: Place) -> None:
    """Killed by the system, at moments of its own choice, with a single checkpoint kept."""
    newest = 0
    for kill in range(4):
        words = [sys.executable, "-c", SAVES_FOR_EVER, str(tmp_path), str(newest + 1)]
        process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": "."})
        assert process.stdout is not None
        known = -1
        while known < newest + 3:
            known = int(process.stdout.readline())
        time.sleep(0.003 * kill)
        process.send_signal(signal.SIGKILL)
        rest = process.stdout.read().split()
        process.wait(timeout=20)
        sealed = int(rest[-1]) if rest else known
        found = Checkpoints(tmp_path, place, 1).newest_valid()
        assert found is not None and found[0] >= sealed
        state = torch.load(found[1] / "s.pt", weights_only=True)
        assert (state["weights"] == found[0]).all()
        newest = found[0]


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of three ranks was told in checkpoint_job.py."""
    folder = tmp_path_factory.mktemp("job")
    words = ["-m", "torch.distributed.run", "--nproc-per-node=3", "--standalone", str(JOB), str(folder)]
    settings = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(JOB.parents[2])}
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=120, env=settings)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((folder / f"told-{rank}.json").read_text()) for rank in range(3)]


@pytest.mark.parametrize("case", ["good", "slow"])
def test_ranks_seal_together(told: list[dict[str, Any]], case: str) -> None:
    for rank in told:
        assert rank[case]["saved"] and rank[case]["saved_step"] == (1 if case == "good" else 6)
        assert rank[case]["files"] == ["rank0.pt", "rank1.pt", "rank2.pt"] and rank[case]["said"] == ""


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("raises", "rank 1: out of memory)"),
        ("full_disk", "rank 2: [Errno 28] No space left on device)"),
        ("silent", "rank 2: no word in 0 s; does it see this folder?)"),
        ("elsewhere", "rank2.pt is not seen by rank 0; do all ranks share this file system?)"),
    ],
)
def test_one_rank_in_trouble_neither_hangs_the_others_nor_seals_half(
    told: list[dict[str, Any]], case: str, words: str
) -> None:
    assert [rank[case]["began"] for rank in told] == [True] * 3
    assert [rank[case]["saved"] for rank in told] == [False] * 3
    assert [rank[case]["files"] for rank in told] == [[]] * 3
    assert told[0][case]["said"].count("\n") == 1 and words in told[0][case]["said"]
    assert told[1][case]["said"] == told[2][case]["said"] == "" and not told[0][case]["left over"]


def test_ranks_that_hold_replicas_write_nothing(told: list[dict[str, Any]]) -> None:
    assert [rank["replicas"]["saved_step"] for rank in told] == [7] * 3
    assert told[0]["replicas"]["files"] == ["rank0.pt", "rank1.pt"]
    assert [rank["replicas"]["wrote"] for rank in told] == [True, True, False]


def test_all_ranks_pass_over_what_one_finds_damaged(told: list[dict[str, Any]]) -> None:
    assert [rank["newest"]["step"] for rank in told] == [6] * 3
    assert [rank["newest"]["about"] for rank in told] == [{"step was": 6}] * 3
    assert "".join(rank["newest"]["said"] for rank in told).count("rank1.pt was cut or changed") == 1
