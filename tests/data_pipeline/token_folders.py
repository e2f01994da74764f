"""Folders of token shards for tests, damaged on purpose where a test wants it."""

import io
from pathlib import Path

import numpy as np

from cluster.manifest import write_manifest
from data_pipeline.shards import Sample, open_shard, write_shard
from tests.pairs import caption

GRID, CODEBOOK, CROPS = 2, 512, 3
MADE_FROM = {"images": "i" * 64, "dvae": "d" * 64, "vocab": "v" * 64}


def token_sample(n: int) -> Sample:
    """Sample n: three crops of 2 x 2 codes, 3 n + crop everywhere, and one of 28 captions."""
    crops = np.stack([np.full((GRID, GRID), (CROPS * n + crop) % CODEBOOK, np.uint16) for crop in range(CROPS)])
    return Sample(f"{n:04d}", {"npy": npy(crops), "txt": caption(n).encode()})


def npy(array: np.ndarray) -> bytes:
    out = io.BytesIO()
    np.save(out, array)
    return out.getvalue()


def write_tokens(folder: Path, sizes: list[int], first: int = 0, made_from: dict[str, str] = MADE_FROM) -> Path:
    """A tokens/ folder of shards of these sizes, samples numbered from `first` on, and one held-out sample."""
    folder.mkdir(parents=True, exist_ok=True)
    names, start = [], first
    for number, size in enumerate(sizes):
        names.append(f"train-{number:06d}.tar")
        write_shard(folder / names[-1], [token_sample(n) for n in range(start, start + size)])
        start += size
    write_shard(folder / "heldout-000000.tar", [token_sample(first + 900)])
    lengths = [0] * 5 + [start - first]
    counts = {"train": start - first, "heldout": 1, "grid": GRID, "codebook": CODEBOOK, "captions_by_tokens": lengths}
    write_manifest(folder, "tokens", {}, counts, [*names, "heldout-000000.tar"], made_from)
    return folder


def overwrite(tar: Path, number: int, ending: str, data: bytes) -> None:
    """Change the first bytes of a member in place: the tar keeps its size, so that it opens."""
    at, n_bytes = open_shard(tar).places[number][ending]
    assert len(data) <= n_bytes
    with open(tar, "r+b") as file:
        file.seek(at)
        file.write(data)
