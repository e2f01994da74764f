"""The loader's benchmark in small: every row is measured or says why not, and what it sets side by side is equal."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.loader import (
    SIDE,
    Row,
    captions,
    image_rows,
    made_vocabulary,
    photo,
    shown,
    start_row,
    to_tensor,
)
from data_pipeline.images import square


def test_pictures_are_set_beside_bare_decoding_and_other_loaders(tmp_path: Path) -> None:
    rows = list(image_rows(tmp_path, 64))
    assert [row.what for row in rows] == [
        "pictures: times the cost of bare decoding",
        "pictures: times the speed of webdataset",
        "pictures: times the speed of dalle-pytorch",
    ]
    assert all(row.value is not None and row.value > 0 for row in rows[:2])
    assert all(row.value is not None or row.note.startswith("skipped: ") for row in rows)


def test_a_late_start_is_set_beside_an_early_one(tmp_path: Path) -> None:
    made_vocabulary(tmp_path / "vocab", captions())
    row = start_row(tmp_path, 5, 200)
    assert row.value is not None and row.value > 0 and "1,000 samples in 5 shards" in row.note


def test_the_other_loaders_crop_is_ours() -> None:
    data = photo(np.random.default_rng(0))
    expected = torch.from_numpy(square(data, SIDE).copy()).permute(2, 0, 1) / 255
    assert torch.equal(to_tensor(Image.open(io.BytesIO(data))), expected)


@pytest.mark.parametrize(
    ("value", "at_least", "ok", "word"),
    [(2.0, True, True, "ok"), (0.5, True, False, "MISSED"), (0.5, False, True, "ok"), (None, True, None, "skipped")],
)
def test_a_row_is_held_against_its_bar(value: float | None, at_least: bool, ok: bool | None, word: str) -> None:
    row = Row("what", value, 1.0, at_least, "note")
    assert row.ok is ok and word in shown(row)
