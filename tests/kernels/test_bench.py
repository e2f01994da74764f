"""The CPU benchmark measures what its rows say, prints them as JSON, and keeps every run."""

import csv
import json
from pathlib import Path

import pytest
import torch

from kernels import bench
from kernels.layout import Layout
from kernels.measure import best_of

FIELDS = {"what", "ratio", "bar", "ours", "theirs", "load", "bound", "note"}
FAKE = """
import json, sys
assert sys.argv[1:] in (["step", "1"], ["memory", "4"], ["sample", "1"], ["sample", "8"]), sys.argv
print(json.dumps({"ours": 3.0, "theirs": 4.0, "ratio": 0.75, "load": 0.1, "note": " ".join(sys.argv[1:])}))
"""


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Small sizes, and a stand-in for the rows that need a model; gives where results go."""
    monkeypatch.setattr(bench, "PAPER", Layout(16, 8, 8))
    monkeypatch.setattr(bench, "ROUNDS", 1)
    (tmp_path / "stand_in.py").write_text(FAKE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(bench, "MODEL", "stand_in")
    return tmp_path / "results.csv"


def test_every_row_of_the_table_is_printed_as_json_and_recorded(
    small: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["bench", "--json", "--results", str(small)])
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    bench.main()
    bench.main()
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    names = ["attention/row", "attention/column", "attention/conv", "step/floor", "step/memory", "sample/1", "sample/8"]
    assert [row["what"] for row in rows] == 2 * [*names, "cache/plain", "cache/shared"]
    assert all(row.keys() == FIELDS for row in rows)
    for row in rows:
        assert row["ratio"] == pytest.approx(row["theirs"] / row["ours"]) or row["ratio"] == pytest.approx(
            row["ours"] / row["theirs"]
        )
    with small.open(newline="") as file:
        kept = list(csv.DictReader(file))
    assert len(kept) == 18 and kept[0]["torch"] == torch.__version__ and kept[9]["what"] == "attention/row"


def test_attention_rows_tell_how_many_times_as_fast(small: Path) -> None:
    row = bench.attention_row("row")
    assert row.ratio == row.theirs / row.ours and row.bound == "at least" and row.bar == 3.0


def test_caches_of_the_paper_sequence_are_within_their_bars() -> None:
    plain, shared = bench.cache_row("plain", 1, 1 / 2), bench.cache_row("shared", 8, 1 / 3)
    assert plain.theirs == 12 * 2 * 8 * 1280 * 64 * 4 and shared.theirs == 8 * plain.theirs
    assert 0 < plain.ratio <= plain.bar and 0 < shared.ratio <= shared.bar


def test_a_model_row_that_fails_says_so_in_one_line(small: Path) -> None:
    with pytest.raises(SystemExit, match="stand_in wrong failed: AssertionError"):
        bench.model_row("x", ["wrong"], 1.0, "at most")


def test_the_best_round_counts_and_the_first_does_not() -> None:
    calls: list[str] = []
    times = best_of(3, lambda: calls.append("a"), lambda: calls.append("b"))
    assert calls == ["a", "b"] * 4 and len(times) == 2 and all(time >= 0 for time in times)
