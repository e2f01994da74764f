"""The clock, the floors and the files of results that benchmarks share."""

import time
from pathlib import Path
from typing import Any

import pytest
import torch

from kernels.measure import Ceilings, Clock, append, ceilings, first_line, table

CPU = torch.device("cpu")


def test_only_the_work_is_timed_not_what_prepares_it() -> None:
    clock = Clock(CPU, runs=3, warmups=1)
    assert clock.seconds(lambda ready: time.sleep(0.002 * ready), lambda: time.sleep(0.1) or 1) < 0.05
    assert clock.seconds(lambda _: time.sleep(0.002)) >= 0.002


def test_on_a_gpu_work_waits_for_its_launches_and_stands_alone_between_the_events(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With a device that only writes down what it is told."""
    order: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            self.seconds = 0.0

        def record(self) -> None:
            order.append("event")

        def elapsed_time(self, end: "Event") -> float:
            return 7.0  # ms

    class Cold:
        def amax(self) -> None:
            order.append("cold")

    def sleep(cycles: int) -> None:
        assert cycles > 0
        order.append("wait")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", sleep)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: order.append("synchronize"))
    clock = Clock(CPU, runs=2, warmups=0)
    clock.cold = Cold()  # type: ignore[assignment]
    seconds = clock.seconds(lambda ready: order.append(f"work {ready}"), lambda: order.append("prepare") or 5)
    assert seconds == pytest.approx(0.007)
    run = ["prepare", "cold", "wait", "event", "work 5", "event"]
    assert order == ["prepare", "synchronize", "work 5", "synchronize", *run, *run, "synchronize"]


def test_the_floor_is_the_larger_of_bytes_and_products() -> None:
    reached = Ceilings(bandwidth=100.0, matmul=1000.0)
    assert reached.floor(200, 100) == 2.0
    assert reached.floor(200, 5000) == 5.0


def test_ceilings_count_what_a_copy_reads_and_writes_and_two_flops_a_product() -> None:
    class Second(Clock):
        def seconds(self, work: Any, prepare: Any = None) -> float:
            work(None)
            return 1.0

    assert ceilings(Second(CPU, 1, 0), n_copied=4096, side=8) == Ceilings(2 * 4096, 2 * 8**3)


def test_rows_of_several_runs_stand_under_one_header(tmp_path: Path) -> None:
    path = tmp_path / "results.csv"
    append([{"what": "a", "us": 1.234567}], path)
    append([{"what": "b", "us": None}], path)
    append([], path)
    assert path.read_text() == "what,us\na,1.2346\nb,\n"


def test_rows_do_not_join_a_file_of_other_columns(tmp_path: Path) -> None:
    path = tmp_path / "results.csv"
    append([{"what": "a", "us": 1.0}], path)
    with pytest.raises(ValueError, match="other columns"):
        append([{"what": "a", "ms": 1.0}], path)
    assert path.read_text() == "what,us\na,1\n"


def test_a_table_has_columns_as_wide_as_their_cells() -> None:
    rows: list[dict[str, object]] = [{"what": "long name", "us": 1.5, "more": 0}, {"what": "b", "us": None, "more": 0}]
    assert table(rows, ["what", "us"]) == "what       us\nlong name  1.5\nb"


def test_an_error_is_told_in_one_line() -> None:
    assert first_line(ValueError("bad shape\nat length")) == "ValueError: bad shape"
    assert first_line(KeyError()) == "KeyError"
