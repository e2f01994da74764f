"""The benchmark of copies measures what it says, on few pictures."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks import dedupe
from benchmarks.dedupe import BITS, CHANGES, rows


def test_shares_and_times_come_from_real_marks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dedupe, "MOST", 12)
    folder = tmp_path / "mine"
    folder.mkdir()
    for number in range(3):
        small = np.random.default_rng(number).integers(0, 256, (6, 6, 3), np.uint8)
        Image.fromarray(small).resize((80, 80), Image.Resampling.BICUBIC).save(folder / f"{number}.png")
    (folder / "broken.png").write_bytes(b"no picture")
    Image.new("RGB", (80, 80)).save(folder / "flat.png")
    measured = dict(rows(folder, count=1000))
    assert len(measured) == 2 * len(BITS) * (len(CHANGES) + 1) + 2 + 1 + len(BITS)
    assert measured["mine: half the size, share within 4 bits"] == 1.0
    assert measured["mine: pairs of different pictures, share within 8 bits"] == 0.0
    for name in ("embedded", "mine"):
        for change in CHANGES:
            shares = [measured[f"{name}: {change}, share within {most} bits"] for most in BITS]
            assert shares == sorted(shares)
    assert all(value >= 0 for value in measured.values())
