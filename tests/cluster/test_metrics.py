"""Metrics: after a kill and a resume they read as one uninterrupted run."""

import math
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cluster.metrics import Metrics, Progress, read_metrics


def record(folder: Path, first: int, last: int, loss: float) -> None:
    metrics = Metrics(folder, first)
    for step in range(first, last):
        metrics.record(step, {"train/loss": loss + step})
    metrics.close()


def test_a_resumed_run_reads_as_one_run(tmp_path: Path) -> None:
    record(tmp_path, 0, 6, loss=0.0)
    record(tmp_path, 4, 8, loss=100.0)
    expected = [(step, step + (100.0 if step >= 4 else 0.0)) for step in range(8)]
    assert [(line["step"], line["train/loss"]) for line in read_metrics(tmp_path)] == expected
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert [(event.step, event.value) for event in board.Scalars("train/loss")] == expected


def test_a_line_cut_by_a_kill_is_dropped_and_written_anew(tmp_path: Path) -> None:
    record(tmp_path, 0, 3, loss=0.0)
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text()[:-9])
    assert [line["step"] for line in read_metrics(tmp_path)] == [0, 1]
    record(tmp_path, 2, 4, loss=0.0)
    assert [line["step"] for line in read_metrics(tmp_path)] == [0, 1, 2, 3]


def test_records_lie_on_disk_at_once_and_keep_numbers_that_are_not_finite(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path, 0)
    metrics.record(0, {"train/loss": math.nan, "train/norm": math.inf})
    (line,) = read_metrics(tmp_path)
    metrics.close()
    assert math.isnan(line["train/loss"]) and line["train/norm"] == math.inf


def test_no_run_has_no_metrics(tmp_path: Path) -> None:
    assert read_metrics(tmp_path) == []


def test_progress_outside_a_terminal_is_a_line_now_and_then(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [100.0]
    monkeypatch.setattr("cluster.metrics.time.monotonic", lambda: now[0])
    progress = Progress("train", total=1000, done=900)
    for _ in range(100):
        now[0] += 0.5
        progress.advance(note="loss 1.000")
    progress.close()
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[1] for line in lines] == [
        "901/1000",
        "921/1000",
        "941/1000",
        "961/1000",
        "981/1000",
        "1000/1000",
    ]
    assert "2 steps/s, 30 s left, loss 1.000" in lines[2]
    assert "2 steps/s" in lines[0] and " 0 s left" in lines[-1]
