"""Cut the embedded emoji set out of an img2dataset folder of the four emoji styles.

    python -m data_pipeline.emoji.make IMG2DATASET_FOLDER

Kept as the record of how `train-*.tar.gz` and `heldout-*.tar.gz` beside it were made (README.md
there says from what). The choice is by hash, so the same input gives the same bytes.
"""

import gzip
import hashlib
import io
import json
import sys
import tarfile
from pathlib import Path

from PIL import Image

STYLES = ("3d", "flat", "noto")
N_CONCEPTS = 1_250
HELDOUT_FRACTION = 0.05
SIDE = 128
WEBP_QUALITY = 75
SAMPLES_PER_SHARD = 1_000


def rank(text: str) -> str:
    """A fixed pseudo-random order of names."""
    return hashlib.sha256(text.encode()).hexdigest()


def read_cells(folder: Path) -> dict[tuple[str, str], tuple[bytes, dict]]:
    """All (concept, style) cells of the folder: encoded picture and its json."""
    cells = {}
    for path in sorted(folder.glob("*.tar")):
        members: dict[str, dict[str, bytes]] = {}
        with tarfile.open(path) as tar:
            for member in tar:
                key, ending = member.name.split(".", 1)
                content = tar.extractfile(member)
                members.setdefault(key, {})[ending] = content.read() if content else b""
        for files in members.values():
            about = json.loads(files["json"])
            cells[about["concept"], about["style"]] = files["webp"], about
    return cells


def choose(cells: dict[tuple[str, str], tuple[bytes, dict]]) -> tuple[list, list]:
    """Split into (train, held-out) cells; a concept loses at most one style to the held-out part."""
    concepts = {concept for concept, _ in cells if "skin tone" not in concept}
    whole = [c for c in concepts if all((c, style) in cells for style in STYLES)]
    chosen = sorted(whole, key=rank)[:N_CONCEPTS]
    n_heldout = round(HELDOUT_FRACTION * len(chosen) * len(STYLES))
    heldout = {(c, min(STYLES, key=lambda style: rank(c + style))) for c in chosen[:n_heldout]}
    every = sorted(((c, style) for c in chosen for style in STYLES), key=lambda cell: rank(str(cell)))
    return [cell for cell in every if cell not in heldout], sorted(heldout)


def encode(picture: bytes) -> bytes:
    image = Image.open(io.BytesIO(picture)).convert("RGB").resize((SIDE, SIDE), Image.Resampling.LANCZOS)
    out = io.BytesIO()
    image.save(out, "webp", quality=WEBP_QUALITY, method=6)
    return out.getvalue()


def write_shard(path: Path, cells: list, source: dict) -> None:
    with (
        open(path, "wb") as raw,
        gzip.GzipFile("", "wb", 9, raw, mtime=0) as packed,
        tarfile.open(fileobj=packed, mode="w", format=tarfile.USTAR_FORMAT) as tar,
    ):
        for number, cell in enumerate(cells):
            picture, about = source[cell]
            kept = {name: about[name] for name in ("concept", "style", "group", "license")}
            key = f"{path.name.split('.')[0]}-{number:04d}"
            for ending, data in (
                ("webp", encode(picture)),
                ("txt", about["caption"].encode()),
                ("json", json.dumps(kept).encode()),
            ):
                member = tarfile.TarInfo(f"{key}.{ending}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def main(words: list[str]) -> None:
    source = read_cells(Path(words[0]))
    for split, cells in zip(("train", "heldout"), choose(source), strict=True):
        for number in range(0, len(cells), SAMPLES_PER_SHARD):
            part = cells[number : number + SAMPLES_PER_SHARD]
            path = Path(__file__).parent / f"{split}-{number // SAMPLES_PER_SHARD:05d}.tar.gz"
            write_shard(path, part, source)
            print(path.name, len(part), "pairs", path.stat().st_size, "bytes")


if __name__ == "__main__":
    main(sys.argv[1:])
