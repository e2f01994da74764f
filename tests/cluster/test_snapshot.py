"""A snapshot holds what a state was, in memory and in files of its own."""

import errno
import hashlib
from collections import OrderedDict
from enum import IntEnum
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from cluster import snapshot
from cluster.snapshot import HostMemory, SnapshotWriter


class Stage(IntEnum):
    SECOND = 2


class Scaler:
    def __init__(self) -> None:
        self.scale = [1.0]


def written(state: Any, folder: Path) -> Path:
    writer = SnapshotWriter()
    writer.clear()
    writer.save(state, str(folder / "new" / "state.pt"))
    assert writer.problem == ""
    writer.write_out()
    return folder / "new" / "state.pt"


def test_values_dtypes_and_structure_come_back(tmp_path: Path) -> None:
    state = {
        "floats": torch.linspace(0, 1, 12).view(3, 4).t(),
        "codes": torch.arange(5, dtype=torch.int16),
        "halves": torch.ones(3, dtype=torch.bfloat16),
        "step": torch.tensor(7.0),
        "none": torch.empty(0, 4),
        "weight": nn.Parameter(torch.ones(2)),
        "nested": [(1, "a", None), {"size": torch.Size([2, 3])}],
    }
    read = torch.load(written(state, tmp_path), weights_only=True)
    assert read.keys() == state.keys() and read["nested"] == state["nested"]
    for name, value in state.items():
        if isinstance(value, torch.Tensor):
            assert read[name].dtype == value.dtype and torch.equal(read[name], value)
    assert not read["weight"].requires_grad


def test_a_view_is_stored_without_the_rest_and_what_is_shared_once(tmp_path: Path) -> None:
    flat = torch.arange(10**6, dtype=torch.float32)
    path = written({"part": flat[5:9], "again": flat[5:9]}, tmp_path)
    assert path.stat().st_size < 10_000
    read = torch.load(path, weights_only=True)
    assert read["part"].tolist() == [5, 6, 7, 8] and read["part"].data_ptr() == read["again"].data_ptr()


def test_enumerations_become_plain_and_other_objects_are_copied(tmp_path: Path) -> None:
    scaler = Scaler()
    writer = SnapshotWriter()
    writer.save({"stage": Stage.SECOND, "scaler": scaler}, str(tmp_path / "state.pt"))
    scaler.scale[0] = 2.0
    writer.write_out()
    read = torch.load(tmp_path / "state.pt", weights_only=False)
    assert type(read["stage"]) is int and read["stage"] == 2 and read["scaler"].scale == [1.0]


def test_a_modules_versions_are_kept(tmp_path: Path) -> None:
    state = nn.BatchNorm1d(3).state_dict()
    read = torch.load(written(state, tmp_path), weights_only=True)
    assert isinstance(read, OrderedDict) and read._metadata == state._metadata  # type: ignore[attr-defined]


def test_the_record_is_that_of_the_file(tmp_path: Path) -> None:
    writer = SnapshotWriter()
    writer.save({"weights": torch.rand(12345)}, str(tmp_path / "state.pt"))
    (record,) = writer.write_out().items()
    data = (tmp_path / "state.pt").read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    assert record == (str(tmp_path / "state.pt"), {"bytes": len(data), "sha256": digest})


def test_a_rank_that_writes_nothing_keeps_nothing(tmp_path: Path) -> None:
    writer = SnapshotWriter(writes=False)
    writer.save({"weights": torch.rand(10)}, str(tmp_path / "state.pt"))
    assert writer.write_out() == {} and writer.memory.n_bytes == 0 and not (tmp_path / "state.pt").exists()


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("CUDA error: out of memory\nmore")])
def test_a_state_that_cannot_be_copied_raises_nothing(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    """DeepSpeed's save is collective: who leaves it alone, leaves the others waiting."""

    def fail(n_bytes: int, pinned: bool) -> torch.Tensor:
        raise error

    writer = SnapshotWriter()
    with monkeypatch.context() as patch:
        patch.setattr(snapshot, "_new_block", fail)
        writer.save({"weights": torch.rand(10)}, "state.pt")
    assert writer.problem.startswith("state.pt cannot be copied") and "\n" not in writer.problem
    writer.clear()
    writer.save({"weights": torch.rand(10)}, "state.pt")
    assert writer.problem == ""


def test_a_write_that_fails_leaves_no_file_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that there is room to say so."""
    writer = SnapshotWriter()
    for name in ("a.pt", "b.pt"):
        writer.save({"weights": torch.rand(10)}, str(tmp_path / name))
    real, calls = torch.save, []

    def fail_later(state: Any, file: Any) -> None:
        calls.append(state)
        if len(calls) == 2:
            file.write(b"half")
            raise OSError("full")
        real(state, file)

    monkeypatch.setattr(torch, "save", fail_later)
    with pytest.raises(OSError, match="full"):
        writer.write_out()
    assert list(tmp_path.iterdir()) == []


def test_host_memory_is_dealt_out_apart_and_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshot, "BLOCK_BYTES", 1000)
    memory = HostMemory()
    sizes = [300, 1, 600, 64, 5000, 999, 7]
    places = []
    for _ in range(2):
        memory.clear()
        dealt = [memory.take(size, pinned=False) for size in sizes]
        for number, one in enumerate(dealt):
            one.fill_(number)
            assert one.untyped_storage().nbytes() == len(one)  # or torch.save would write the block
        assert [one.unique().tolist() for one in dealt] == [[number] for number in range(len(sizes))]
        places.append([one.data_ptr() for one in dealt])
    assert places[0] == places[1] and memory.n_bytes < sum(sizes) + 4 * 1000
    memory.clear()
    memory.take(10, pinned=False)
    memory.clear()
    assert memory.n_bytes == 1000


def test_a_full_disk_is_told_in_its_own_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: object, data: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    writer = SnapshotWriter()
    writer.save({"w": torch.ones(8)}, str(tmp_path / "state.pt"))
    monkeypatch.setattr("cluster.snapshot._Digesting.write", full)
    with pytest.raises(OSError, match="No space left on device"):
        writer.write_out()
    assert not (tmp_path / "state.pt").exists()
