"""How well and how fast copies are found: `python -m benchmarks.dedupe [--json] [FOLDER]`; two minutes, one core.

What share of changed pictures is found at each count of bits, and what share of pairs of different pictures would be
taken for copies: on the embedded drawings, and on the pictures of FOLDER if one is given. Then the time for marks, and
for the search among a million made-up hashes of which a tenth are near copies. It is the record behind `near = 4` in
`data_pipeline/configs/paper.toml`.
"""

import argparse
import io
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageEnhance

from data_pipeline.dedupe import NO_HASH, copies, marks
from data_pipeline.images import IMAGE_ENDINGS, ImageProblem, decode
from data_pipeline.shards import read_foreign
from data_pipeline.sources import EMBEDDED

MOST, MILLION = 1000, 1_000_000
BITS = (0, 2, 4, 6, 8)
Change = Callable[[Image.Image], Image.Image]
Row = tuple[str, float]


def as_jpeg(image: Image.Image, quality: int = 50) -> Image.Image:
    out = io.BytesIO()
    image.save(out, "jpeg", quality=quality)
    return Image.open(io.BytesIO(out.getvalue())).convert("RGB")


def halved(image: Image.Image) -> Image.Image:
    return image.resize((max(1, image.width // 2), max(1, image.height // 2)), Image.Resampling.BICUBIC)


def trimmed(image: Image.Image) -> Image.Image:
    x, y = image.width // 50, image.height // 50
    return image.crop((x, y, image.width - x, image.height - y))


CHANGES: dict[str, Change] = {
    "JPEG quality 50": as_jpeg,
    "half the size": halved,
    "half the size as JPEG 70": lambda image: as_jpeg(halved(image), 70),
    "contrast x 0.9": lambda image: ImageEnhance.Contrast(image).enhance(0.9),
    "brightness x 1.1": lambda image: ImageEnhance.Brightness(image).enhance(1.1),
    "2 % cut from each edge": trimmed,
}


def embedded() -> list[Image.Image]:
    """Training drawings, one style after another."""
    samples = (sample for tar in sorted(EMBEDDED.glob("train-*.tar.gz")) for sample in read_foreign(tar))
    pictures = (next(data for ending, data in sample.files.items() if ending in IMAGE_ENDINGS) for sample in samples)
    return [decode(data, MILLION) for data, _ in zip(pictures, range(MOST), strict=False)]


def from_folder(folder: Path) -> list[Image.Image]:
    """At most MOST pictures of a folder that are no smaller than 64 pixels."""
    images: list[Image.Image] = []
    for path in sorted(path for path in folder.rglob("*") if path.suffix[1:].lower() in IMAGE_ENDINGS):
        try:
            image = decode(path.read_bytes(), 100 * MILLION)
        except ImageProblem:
            continue
        images += [image] if min(image.size) >= 64 else []
        if len(images) == MOST:
            break
    return images


def found(name: str, images: list[Image.Image]) -> Iterator[Row]:
    """Shares of changed pictures and of pairs of different ones within each count of bits."""
    looks = np.array([marks(image)[1] for image in images], np.uint64)
    images = [image for image, look in zip(images, looks, strict=True) if look != NO_HASH]
    looks = looks[looks != NO_HASH]
    for change, changed in CHANGES.items():
        bits = np.bitwise_count(looks ^ np.array([marks(changed(image))[1] for image in images], np.uint64))
        for most in BITS:
            yield f"{name}: {change}, share within {most} bits", float((bits <= most).mean())
    bits = np.concatenate([np.bitwise_count(looks[n + 1 :] ^ look) for n, look in enumerate(looks)])
    for most in BITS:
        yield f"{name}: pairs of different pictures, share within {most} bits", float((bits <= most).mean())


def seconds(count: int, images: list[Image.Image]) -> Iterator[Row]:
    """CPU time of the marks of a picture and of the search among `count` hashes."""
    for side in (256, 1024):
        sized = [image.resize((side, side)) for image in images[:20]]
        start = time.process_time()
        for image in sized:
            marks(image)
        yield f"marks of a picture of {side} x {side}, ms", 1000 * (time.process_time() - start) / len(sized)
    random = np.random.default_rng(0)
    hashes = random.integers(1, 2**64, count, np.uint64)
    again = random.random(count) < 0.1
    flipped = np.uint64(1) << random.integers(0, 64, count).astype(np.uint64)
    hashes[again] = hashes[random.integers(0, count, count)][again] ^ flipped[again]
    digests = random.integers(0, 256, (count, 32), np.uint8)
    for near in (-1, *BITS):
        start = time.process_time()
        copies(digests, hashes, near, 1)
        yield f"copies of {count:,} at near={near}, s", time.process_time() - start


def rows(folder: Path | None, count: int = MILLION) -> Iterator[Row]:
    """All measures."""
    drawings = embedded()
    yield from found("embedded", drawings)
    if folder:
        yield from found(folder.name, from_folder(folder))
    yield from seconds(count, drawings)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("folder", nargs="?", type=Path)
    words = parser.parse_args()
    for what, value in rows(words.folder):
        print(json.dumps({"what": what, "value": value}) if words.json else f"{value:12.6f}  {what}", flush=True)
