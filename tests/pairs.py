"""Tiny image-caption pairs and tars of them, made for tests."""

import io
import tarfile
from pathlib import Path
from typing import Literal

from PIL import Image

COLOURS = ("red", "green", "blue", "black", "white", "orange", "purple")
SHAPES = ("square", "tile", "glass pane", "stone")

Members = list[tuple[str, bytes]]


def picture(colour: str, size: tuple[int, int] = (20, 16), kind: str = "png") -> bytes:
    """A picture of one colour, as encoded bytes."""
    return encoded(Image.new("RGB", size, colour), kind)


def encoded(image: Image.Image, kind: str) -> bytes:
    out = io.BytesIO()
    image.save(out, kind)
    return out.getvalue()


def caption(number: int) -> str:
    """One of 28 texts."""
    return f"a {COLOURS[number % 7]} {SHAPES[number // 7 % 4]} in a mosaic"


def make_pairs(folder: Path, count: int) -> Path:
    """`count` pictures NNNN.png with NNNN.txt beside them."""
    folder.mkdir(parents=True)
    for number in range(count):
        (folder / f"{number:04d}.png").write_bytes(picture(COLOURS[number % 7]))
        (folder / f"{number:04d}.txt").write_text(caption(number))
    return folder


def pair_members(numbers: range) -> Members:
    """Members of a tar as img2dataset sorts them: json, txt, picture."""
    members = []
    for n in numbers:
        about = f'{{"caption": "{caption(n)}"}}'.encode()
        image = picture(COLOURS[n % 7])
        members += [(f"{n:04d}.json", about), (f"{n:04d}.txt", caption(n).encode()), (f"{n:04d}.png", image)]
    return members


def write_tar(path: Path, members: Members, mode: Literal["w", "w:gz", "w:bz2", "w:xz"] = "w") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def tree(folder: Path) -> dict[str, bytes]:
    """Every file under a folder, by its name from there."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
