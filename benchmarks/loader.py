"""Time the loader: `python -m benchmarks.loader [--json]`; about 2 minutes on one core, nothing is downloaded.

Each row is a ratio with its bar: against the training step that it feeds, against bare decoding, against
webdataset and dalle-pytorch's own loader where they are installed, and a late start against an early one. CPU time of
one thread; what is compared takes turns in one process.
"""

import argparse
import importlib
import io
import itertools
import json
import os
import tempfile
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from cluster.manifest import write_manifest
from cluster.settings import from_dict
from data_pipeline.bpe import Vocabulary, learn_vocabulary, open_vocabulary
from data_pipeline.images import square
from data_pipeline.loader import ImageBatches, LoaderConfig, Shards, TokenBatches
from data_pipeline.shards import Sample, read_foreign, write_shard
from data_pipeline.sources import EMBEDDED
from kernels.measure import best_of
from pretrain.config import TrainConfig
from pretrain.model import Sizes
from pretrain.update import Update

BATCH, ROUNDS = 64, 5
CODEBOOK, GRID = 1024, 8
SIDE, JPEG_QUALITY = 256, 90
PRESET = Path(__file__).parent.parent / "pretrain" / "configs" / "emoji.toml"


@dataclass(frozen=True)
class Row:
    """One measure, and on which side of its bar it should be. No value: it was skipped, the note says why."""

    what: str
    value: float | None
    bar: float
    at_least: bool
    note: str

    @property
    def ok(self) -> bool | None:
        if self.value is None:
            return None
        return self.value >= self.bar if self.at_least else self.value <= self.bar


def captions() -> list[str]:
    """Those of the embedded pictures."""
    tars = sorted(EMBEDDED.glob("train-*.tar.gz"))
    return [sample.files["txt"].decode() for tar in tars for sample in read_foreign(tar)]


def made_vocabulary(folder: Path, texts: list[str]) -> Vocabulary:
    learn_vocabulary(texts, 1536, folder, {}, "")
    return open_vocabulary(folder)[0]


def write_tokens(folder: Path, texts: list[str]) -> Path:
    """Token shards of random codes with these captions, 1000 to a shard."""
    random = np.random.default_rng(0)
    folder.mkdir()
    names: list[str] = []
    for first in range(0, len(texts), 1000):
        samples = []
        for n, text in enumerate(texts[first : first + 1000], first):
            out = io.BytesIO()
            np.save(out, random.integers(0, CODEBOOK, (1, GRID, GRID), np.uint16))
            samples.append(Sample(f"{n:06d}", {"npy": out.getvalue(), "txt": text.encode()}))
        names.append(f"train-{len(names):06d}.tar")
        write_shard(folder / names[-1], samples)
    counts = {"train": len(texts), "grid": GRID, "codebook": CODEBOOK}
    write_manifest(folder, "tokens", {}, counts, names, {})
    return folder


def step_seconds(vocabulary: Vocabulary) -> tuple[float, str]:
    """CPU seconds of the `emoji` preset's fastest training step at batch 64, and its precision."""
    config = from_dict(TrainConfig, tomllib.loads(PRESET.read_text()))
    sizes, cpu = Sizes(vocabulary.size, CODEBOOK, GRID), torch.device("cpu")
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16}
    steps = [Update(config.model, sizes, BATCH, cpu, dtype) for dtype in dtypes.values()]
    return min(zip(best_of(3, *steps), dtypes, strict=True))


def endless(batches: Any) -> Callable[[], object]:
    """Reads the next batch in this thread at each call."""
    steps = itertools.count()
    return lambda: batches.read(next(steps))


def token_rows(folder: Path) -> Iterator[Row]:
    """Samples loaded in the time in which the fastest training step consumes one."""
    texts = captions()
    vocabulary = made_vocabulary(folder / "vocab", texts)
    shards = Shards(write_tokens(folder / "tokens", texts), "tokens", "train")
    step, precision = step_seconds(vocabulary)
    for dropout in (0.0, 0.1):
        batches = TokenBatches(shards, LoaderConfig(batch=BATCH), vocabulary, 16, dropout, 0.1)
        (seconds,) = best_of(20, endless(batches))
        note = (
            f"{BATCH / seconds:,.0f} samples/s; the emoji preset's {precision} step takes {BATCH / step:,.0f} samples/s"
        )
        yield Row(f"tokens loaded, of those trained on (BPE dropout {dropout})", step / seconds, 20, True, note)
    long = " and ".join(texts[:50])
    short = long[: len(long) // 8]
    random = np.random.default_rng(0)
    costs = best_of(ROUNDS, *(lambda t=t: vocabulary.encode_with_dropout(t, 0.1, random) for t in (short, long)))
    note = f"{len(short)} and {len(long)} characters: {costs[0] * 1e3:.2f} and {costs[1] * 1e3:.2f} ms"
    yield Row("BPE dropout of 8 times the text: times the cost", costs[1] / costs[0], 16, False, note)


def photo(random: np.random.Generator) -> bytes:
    """A JPEG as heavy as a photograph of 341 x 256, about 25 kB: shapes of all sizes and some grain."""
    width, height = SIDE * 4 // 3, SIDE
    layers = np.zeros((height, width, 3))
    for cells, weight in ((3, 90.0), (12, 45.0), (48, 22.0), (128, 9.0)):
        noise = random.normal(128, 40, (cells, cells * 4 // 3, 3)).clip(0, 255).astype(np.uint8)
        large = Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)
        layers += (np.asarray(large) - 128.0) * (weight / 40)
    out = io.BytesIO()
    pixels = (layers + 128 + random.normal(0, 3, layers.shape)).clip(0, 255).astype(np.uint8)
    Image.fromarray(pixels).save(out, "jpeg", quality=JPEG_QUALITY)
    return out.getvalue()


def write_images(folder: Path, texts: list[str], count: int) -> Path:
    """One shard of photos."""
    random = np.random.default_rng(0)
    folder.mkdir()
    samples = [Sample(f"{n:06d}", {"jpg": photo(random), "txt": texts[n].encode()}) for n in range(count)]
    write_shard(folder / "train-000000.tar", samples)
    write_manifest(folder, "images", {}, {"train": count}, ["train-000000.tar"], {})
    return folder


def to_tensor(image: Image.Image) -> torch.Tensor:
    """(3, side, side) float32 in [0, 1] of the middle square: the crop of `square`, written plainly."""
    shorter = min(image.size)
    left, top = (image.width - shorter) // 2, (image.height - shorter) // 2
    cropped = image.convert("RGB").crop((left, top, left + shorter, top + shorter))
    resized = cropped if shorter == SIDE else cropped.resize((SIDE, SIDE), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(resized)).permute(2, 0, 1).float() / 255


def with_webdataset(tar: Path) -> Callable[[], object]:
    """One pass over the tar with webdataset, as its documentation does it: decode, crop, batch."""
    webdataset = importlib.import_module("webdataset")

    def stacked(samples: list[tuple[torch.Tensor, str]]) -> tuple[torch.Tensor, list[str]]:
        return torch.stack([picture for picture, _ in samples]), [text for _, text in samples]

    def read() -> None:
        data = webdataset.WebDataset(str(tar), shardshuffle=False).decode("pil").to_tuple("jpg", "txt")
        for _ in data.map_tuple(to_tensor, str).batched(BATCH, collation_fn=stacked):
            pass

    return read


def with_dalle_pytorch(folder: Path) -> Callable[[], object]:
    """One pass over a folder of pictures and texts with dalle-pytorch's TextImageDataset and torch's loader."""
    dataset = importlib.import_module("dalle_pytorch.loader").TextImageDataset(
        str(folder), text_len=16, image_size=SIDE, resize_ratio=1.0
    )
    loader = torch.utils.data.DataLoader(dataset, batch_size=BATCH)

    def read() -> None:
        for _ in loader:
            pass

    return read


def image_rows(folder: Path, count: int) -> Iterator[Row]:
    """Pictures against bare decoding of the same bytes in memory, and against the loaders of others."""
    path = write_images(folder / "images", captions(), count)
    shards = Shards(path, "images", "train")
    blobs = [sample.files["jpg"] for sample in shards]
    loose = folder / "loose"
    loose.mkdir()
    for sample in shards:
        for ending, data in sample.files.items():
            (loose / f"{sample.key}.{ending}").write_bytes(data)
    batches = ImageBatches(shards, LoaderConfig(batch=BATCH), SIDE, flip=False)

    def ours() -> None:
        for step in range(count // BATCH):
            batches.read(step)

    parts = itertools.cycle(range(0, count, BATCH))

    def bare() -> None:
        """Decode a batch, keep it, drop it."""
        first = next(parts)
        [square(blob, SIDE) for blob in blobs[first : first + BATCH]]

    whole, floor = best_of(4 * ROUNDS, endless(batches), bare)
    weight = sum(map(len, blobs)) / count / 1e3
    note = f"{BATCH / whole:,.0f} pictures/s of {SIDE} x {SIDE}, {weight:.0f} kB each"
    yield Row("pictures: times the cost of bare decoding", whole / floor, 1.15, False, note)
    peers = {
        "webdataset": lambda: with_webdataset(path / "train-000000.tar"),
        "dalle-pytorch": lambda: with_dalle_pytorch(loose),
    }
    for name, opened in peers.items():
        try:
            theirs = opened()
            theirs()
        except Exception as error:  # whatever an installation lacks
            reason = (str(error) or type(error).__name__).splitlines()[0]
            yield Row(f"pictures: times the speed of {name}", None, 1.0, True, f"skipped: {reason}")
            continue
        whole, other = best_of(ROUNDS, ours, theirs)
        note = f"{count / whole:,.0f} against {count / other:,.0f} pictures/s"
        yield Row(f"pictures: times the speed of {name}", other / whole, 1.0, True, note)


def start_row(folder: Path, n_shards: int, size: int) -> Row:
    """From nothing to the first batch, at 90 % of an epoch against at its start."""
    tokens = folder / "many"
    first = Shards(write_tokens(tokens, ["a tile"] * size), "tokens", "train").shards[0].path
    names = [first.name]
    for number in range(1, n_shards):  # the same tar under other names: only its index is read
        names.append(f"train-{number:06d}.tar")
        for ending in (".tar", ".json"):
            os.link(first.with_suffix(ending), (tokens / names[-1]).with_suffix(ending))
    counts = {"train": n_shards * size, "grid": GRID, "codebook": CODEBOOK}
    write_manifest(tokens, "tokens", {}, counts, names, {})
    vocabulary = open_vocabulary(folder / "vocab")[0]

    def start(step: int) -> None:
        shards = Shards(tokens, "tokens", "train")
        batches = TokenBatches(shards, LoaderConfig(batch=BATCH), vocabulary, 16, 0.1)
        batches.seek(step)
        next(batches)

    early, late = best_of(3, lambda: start(0), lambda: start(int(0.9 * n_shards * size) // BATCH))
    note = f"{n_shards * size:,} samples in {n_shards} shards: {early:.2f} and {late:.2f} s"
    return Row("start at 90 % of an epoch: times that at 0 %", late / early, 1.2, False, note)


def rows(folder: Path, n_pictures: int = 256, n_shards: int = 200) -> Iterator[Row]:
    yield from token_rows(folder)
    yield from image_rows(folder, n_pictures)
    yield start_row(folder, n_shards, 1000)


def shown(row: Row) -> str:
    """A row for people."""
    value = "skipped" if row.value is None else f"{row.value:.2f}"
    bar = f"{'>=' if row.at_least else '<='} {row.bar:g}"
    verdict = {True: "ok", False: "MISSED", None: ""}[row.ok]
    return f"{row.what:<56} {value:>8}  {bar:<8} {verdict:<7} {row.note}"


def tell(about: str | None, measure: Callable[[Path], Iterator[Row]]) -> None:
    """Print the rows that are measured in a folder, on one thread, for people or as JSON; `about` is for --help."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--json", action="store_true", help="one JSON object a row")
    words = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        for row in measure(Path(folder)):
            fields = {"what": row.what, "value": row.value, "bar": row.bar, "ok": row.ok, "note": row.note}
            print(json.dumps(fields | {"load": os.getloadavg()[0]}) if words.json else shown(row), flush=True)


if __name__ == "__main__":
    tell(__doc__, rows)
