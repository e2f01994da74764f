"""Folders of drawn pictures: their list, `samples.jsonl`, and an overview, `grid.png`."""

import io
import json
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from cluster.manifest import write_bytes

MAX_ROWS, MAX_COLUMNS, CELL, LABEL = 32, 16, 64, 14


def save_rows(folder: Path, rows: list[dict[str, Any]]) -> None:
    """Write samples.jsonl: one picture a line, in the order shown."""
    write_bytes(folder / "samples.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())


def read_rows(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Rows of samples.jsonl by caption's folder, in order."""
    rows = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    return {name: list(group) for name, group in groupby(rows, key=lambda row: row["file"].split("/")[0])}


def save_preview(path: Path, pictures: np.ndarray, done: float) -> None:
    """Write the first 16 of (N, P, P, 3) uint8 pictures side by side, white below the part that is done."""
    shown = pictures[:MAX_COLUMNS].copy()
    shown[:, round(shown.shape[1] * done) :] = 255
    data = io.BytesIO()
    Image.fromarray(np.concatenate(list(shown), 1)).save(data, "png")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, data.getvalue())


def caption_grid(folder: Path, rows: list[dict[str, Any]]) -> None:
    """Write grid.png: a line of pictures a caption, the caption above it; at most 32 x 16 of them."""
    groups = [list(group) for _, group in groupby(rows, key=lambda row: row["file"].split("/")[0])][:MAX_ROWS]
    columns = min(MAX_COLUMNS, max(map(len, groups)))
    sheet = Image.new("RGB", (columns * CELL, len(groups) * (CELL + LABEL)), "white")
    pen = ImageDraw.Draw(sheet)
    for line, group in enumerate(groups):
        top = line * (CELL + LABEL)
        pen.text((2, top + 1), group[0]["caption"], fill="black")
        for column, row in enumerate(group[:columns]):
            with Image.open(folder / row["file"]) as picture:
                sheet.paste(picture.resize((CELL, CELL)), (column * CELL, top + LABEL))
    sheet.save(folder / "grid.png")
