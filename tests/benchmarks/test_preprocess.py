"""The benchmark of preprocess and tokenise in small: every row is measured against its floor."""

from pathlib import Path

from benchmarks.preprocess import BAR, rows


def test_every_stage_is_held_against_its_floor(tmp_path: Path) -> None:
    found = list(rows(tmp_path, 24, 24, heldout_only=True))
    assert [row.what.partition(":")[0] for row in found] == [
        "preprocess, photographs",
        "preprocess, photographs, filters and copies",
        "preprocess, emoji",
        "tokenise, the middle square",
        "tokenise, 4 random crops",
    ]
    assert all(row.value is not None and row.value > 0 and row.bar == BAR and row.at_least for row in found)
