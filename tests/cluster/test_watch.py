"""Stop signals: one of them raises a flag, on all ranks; a second one ends the process."""

import os
import signal
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from cluster.checkpoint import Checkpoints
from cluster.process import Place, mean_over_ranks
from cluster.watch import HUNG, INTERRUPTED, REQUEUE, StopWatch

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, INTERRUPTED), (signal.SIGTERM, REQUEUE), (signal.SIGUSR1, REQUEUE)]
)
def test_a_signal_gives_the_exit_code_and_interrupts_nothing(place: Place, number: signal.Signals, code: int) -> None:
    watch = StopWatch(place)
    watch.start()
    assert watch.told_to_stop() == 0
    os.kill(os.getpid(), number)
    assert watch.told_to_stop() == code
    assert watch.told_to_stop() == code


def test_a_time_limit_counts_from_the_start(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    watch, endless = StopWatch(place, minutes=2.0), StopWatch(place)
    now = 1119.0
    assert watch.told_to_stop() == 0
    now = 1121.0
    assert watch.told_to_stop() == REQUEUE and endless.told_to_stop() == 0


HANGS = """
import sys, time
import torch
from cluster import watch
from cluster.process import Place
hang = watch.HangWatch(Place(3, 4, torch.device("cpu")), minutes=0.01)
hang.start()
for _ in range(int(sys.argv[1])):
    time.sleep(0.1)
    hang.beat("what follows step 7")
if sys.argv[2] == "close":
    hang.close()
def stuck_here():
    time.sleep(3 if sys.argv[2] == "close" else 60)
stuck_here()
"""


@pytest.mark.parametrize(("beats", "end"), [("0", "hang"), ("10", "hang"), ("10", "close")])
def test_a_hang_shows_where_every_thread_stands_and_ends_the_process(beats: str, end: str) -> None:
    """0.6 seconds of silence are too long there; ten beats keep it quiet for 1 second."""
    words = [sys.executable, "-c", HANGS, beats, end]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=60, cwd=ROOT)
    if end == "close":
        assert done.returncode == 0 and not done.stderr
        return
    assert done.returncode == HUNG
    doing = "what follows step 7" if beats == "10" else "starting"
    assert f"smalti: rank 3 hangs: {doing} has taken 0.0 minutes (hang_minutes=0.01)" in done.stderr
    assert "in stuck_here" in done.stderr


def test_a_second_signal_ends_the_process_with_its_code(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    codes: list[int] = []
    monkeypatch.setattr("os._exit", codes.append)
    watch = StopWatch(place)
    watch.start()
    os.kill(os.getpid(), signal.SIGTERM)
    assert codes == []
    os.kill(os.getpid(), signal.SIGTERM)
    assert codes == [128 + signal.SIGTERM]


def test_two_ranks_stop_together_and_save_one_checkpoint(tmp_path: Path) -> None:
    mp.spawn(_be_one_of_two, (tmp_path,), nprocs=2)  # raises what a rank raised
    found = Checkpoints(tmp_path / "checkpoints", Place(0, 1, torch.device("cpu")), 1).newest_valid()
    assert found is not None and found[0] == 5
    assert sorted(path.name for path in found[1].glob("*.pt")) == ["rank0.pt", "rank1.pt"]


def _be_one_of_two(rank: int, folder: Path) -> None:
    store = dist.FileStore(str(folder / "store"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=60))
    place = Place(rank, 2, torch.device("cpu"))
    watch = StopWatch(place)
    watch.start()
    assert watch.told_to_stop() == 0
    if rank == 1:
        os.kill(os.getpid(), signal.SIGTERM)
    assert watch.told_to_stop() == REQUEUE
    assert mean_over_ranks(place, {"a": 1.0 + rank, "b": 1e9 + rank}) == {"a": 1.5, "b": 1e9 + 0.5}

    def write(folder: Path, tag: str) -> None:
        (folder / tag / f"rank{rank}.pt").write_bytes(b"state")

    Checkpoints(folder / "checkpoints", place, 1).save(5, {}, write)
    dist.destroy_process_group()
