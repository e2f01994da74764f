"""Stop signals: one of them raises a flag, on all ranks; a second one ends the process."""

import os
import signal
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from cluster.checkpoint import Checkpoints
from cluster.process import Place, mean_over_ranks
from cluster.watch import StopWatch


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_raises_the_flag_and_interrupts_nothing(place: Place, number: signal.Signals) -> None:
    watch = StopWatch(place)
    watch.start()
    assert not watch.told_to_stop()
    os.kill(os.getpid(), number)
    assert watch.told_to_stop()
    assert watch.told_to_stop()


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
    assert not watch.told_to_stop()
    if rank == 1:
        os.kill(os.getpid(), signal.SIGTERM)
    assert watch.told_to_stop()
    assert mean_over_ranks(place, {"a": 1.0 + rank, "b": 1e9 + rank}) == {"a": 1.5, "b": 1e9 + 0.5}

    def write(folder: Path, tag: str) -> None:
        (folder / tag / f"rank{rank}.pt").write_bytes(b"state")

    Checkpoints(folder / "checkpoints", place, 1).save(5, {}, write)
    dist.destroy_process_group()
