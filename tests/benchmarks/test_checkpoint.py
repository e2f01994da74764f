"""The benchmark of saves tells sizes, stalls and shares, and fails where a bar is missed."""

import json
from pathlib import Path

import pytest

from benchmarks import checkpoint
from pretrain.config import TransformerConfig
from pretrain.model import Sizes


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "MODEL", TransformerConfig(n_text=4, n_layers=1, n_heads=1, d_head=8))
    monkeypatch.setattr(checkpoint, "SIZES", Sizes(10, 10, 2))
    monkeypatch.setattr(checkpoint, "ROUNDS", 1)


def test_every_row_is_a_line_of_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(checkpoint, "MOST_SHARE", 1e9)
    monkeypatch.setattr("sys.argv", ["checkpoint", "--json", f"--folder={tmp_path}"])
    assert checkpoint.main() == 0
    rows = {row.pop("what"): row for row in map(json.loads, capsys.readouterr().out.splitlines())}
    assert all(row.keys() == {"value", "bar", "ok"} and row["ok"] for row in rows.values())
    # float32 weights and two moments, and what the file's form takes
    n_bytes = 12e6 * rows["parameters, millions"]["value"]
    assert n_bytes < 1e6 * rows["checkpoint, MB"]["value"] < n_bytes + 50_000
    assert rows["background: stall, share of the time between saves"]["bar"] == 1e9
    assert rows["waiting: stall, ms"]["value"] > 0
    assert list(tmp_path.iterdir()) == []


def test_a_stall_over_the_bar_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(checkpoint, "MOST_SHARE", 1e-9)
    monkeypatch.setattr("sys.argv", ["checkpoint", f"--folder={tmp_path}"])
    assert checkpoint.main() == 1
    assert "(at most 1e-09)" in capsys.readouterr().out
