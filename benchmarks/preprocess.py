"""Time preprocess and tokenise a core: `python -m benchmarks.preprocess [--json]`; about 2 minutes, nothing downloaded.

Each row is the share of its floor that a stage reaches: of preprocess, decoding, shrinking, encoding and hashing the
same pictures; of tokenise, decoding them and the dVAE's forward pass. Stage and floor take turns in one process of one
thread, in CPU time; a stage starts from nothing in each round, with reading, shards, records and manifest.
"""

import io
import itertools
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict, replace
from hashlib import sha256
from pathlib import Path

import numpy as np
import torch

from benchmarks.loader import Row, captions, photo, tell
from cluster.manifest import write_manifest
from cluster.weights import WEIGHTS, save_weights
from data_pipeline.augment import transformer_crop
from data_pipeline.bpe import learn_vocabulary
from data_pipeline.convert import PreprocessConfig
from data_pipeline.filters import Filters
from data_pipeline.images import decode, encode, shrink, square
from data_pipeline.order import counter_random
from data_pipeline.preprocess import COMMAND, preprocess
from data_pipeline.shards import Sample, read_foreign, write_shard
from data_pipeline.sources import EMBEDDED
from dvae.config import DvaeConfig
from dvae.model import Dvae
from dvae.tokenise import TokeniseConfig, tokenise
from dvae.tokenise import encode as encode_codes
from dvae.train import open_dvae
from kernels.measure import best_of

BAR = 0.7  # of the floor: what is left for reading, shards, records and settings
ROUNDS = 3
SIDE, QUALITY = 192, 90
EMOJI_SIDE, EMOJI_VOCAB = 64, 500
CROPS = 4
SMALL = DvaeConfig(image_side=64, fold=8, width=256, n_groups=1, n_blocks=2, n_init=256, codebook=2048)  # emoji-64's


def quiet(work: Callable[[], object]) -> None:
    """Run a stage without its lines."""
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        work()


def afresh(stage: Callable[[Path], object], folder: Path) -> Callable[[], None]:
    """The stage in a new folder at each call; what lies in the one before is removed first."""
    numbers = itertools.count()

    def run() -> None:
        number = next(numbers)
        shutil.rmtree(folder / f"{number - 1}", ignore_errors=True)
        quiet(lambda: stage(folder / f"{number}"))

    return run


def write_photos(folder: Path, count: int, rules: Filters) -> Path:
    """A tar of photographs with captions that these rules keep."""
    random, texts = np.random.default_rng(0), [text for text in captions() if rules.of_caption(text, {}) is None]
    folder.mkdir()
    write_shard(
        folder / "0.tar", [Sample(f"{n:06d}", {"jpg": photo(random), "txt": texts[n].encode()}) for n in range(count)]
    )
    return folder


def preprocess_row(what: str, config: PreprocessConfig, blobs: list[bytes], folder: Path) -> Row:
    """Pictures of the config's source, which are `blobs`, against bare decoding, encoding and hashing."""

    def floor() -> None:
        digest = sha256()
        for blob in blobs:
            image = shrink(decode(blob, config.max_pixels), config.image_side)
            digest.update(encode(image, config.image_format, config.image_quality))

    stage = afresh(lambda out: preprocess(replace(config, out=str(out))), folder)
    quiet(stage)
    kept = json.loads((folder / "0" / "report.json").read_text())["kept: train"]
    if kept != len(blobs):
        raise RuntimeError(f"{what}: {kept} of {len(blobs)} pictures are kept, so the floor does more than the stage")
    whole, bare = best_of(ROUNDS, stage, floor)
    note = f"{len(blobs) / whole:,.0f} pictures/s a core, {len(blobs) / bare:,.0f} bare"
    return Row(f"preprocess, {what}: share of the floor", bare / whole, BAR, True, note)


def preprocess_rows(folder: Path, n_photos: int, heldout_only: bool) -> Iterator[Row]:
    """Photographs as WebP with and without the paper's filters and copies, and the embedded emoji as PNG."""
    paper: PreprocessConfig = COMMAND.settings(["paper"])
    photos = write_photos(folder / "photos", n_photos, Filters(paper.filters))
    blobs = [sample.files["jpg"] for sample in read_foreign(photos / "0.tar")]
    config = PreprocessConfig(str(photos), image_side=SIDE, vocab_size=320, heldout_fraction=0.0, image_quality=QUALITY)
    yield preprocess_row("photographs", config, blobs, folder / "plain")
    careful = replace(config, filters=paper.filters, dedupe=paper.dedupe)
    yield preprocess_row("photographs, filters and copies", careful, blobs, folder / "careful")
    name = "emoji:heldout" if heldout_only else "emoji:train"
    tars = sorted(EMBEDDED.glob(f"{name.partition(':')[2]}-*.tar.gz"))
    drawn = [next(v for k, v in s.files.items() if k not in ("txt", "json")) for tar in tars for s in read_foreign(tar)]
    emoji = replace(config, source=name, image_side=EMOJI_SIDE, image_format="png", vocab_size=EMOJI_VOCAB)
    yield preprocess_row("emoji", emoji, drawn, folder / "emoji")


def write_dvae(folder: Path) -> Path:
    """An untrained dVAE of the smallest preset's shape: the cheaper its forward pass, the harder the bar."""
    folder.mkdir()
    torch.manual_seed(0)
    save_weights(folder, Dvae(SMALL).state_dict())
    write_manifest(folder, "dvae", {"model": asdict(SMALL)}, {}, [WEIGHTS], {})
    return folder


def tokenise_rows(folder: Path, n_photos: int) -> Iterator[Row]:
    """The middle square of each picture, and several random crops of it."""
    random, texts = np.random.default_rng(1), captions()[:n_photos]
    images, side = folder / "images", SMALL.image_side
    images.mkdir()
    blobs = [encode(shrink(decode(photo(random), 10**8), side * 9 // 8), "webp", QUALITY) for _ in texts]
    pairs = zip(blobs, texts, strict=True)
    write_shard(
        images / "train-000000.tar",
        [Sample(f"{n:06d}", {"webp": blob, "txt": text.encode()}) for n, (blob, text) in enumerate(pairs)],
    )
    write_manifest(images, "images", {}, {"train": n_photos, "heldout": 0}, ["train-000000.tar"], {})
    quiet(lambda: learn_vocabulary(texts, 320, folder / "vocab", {}, ""))
    dvae = write_dvae(folder / "dvae")
    model, _ = open_dvae(dvae, torch.device("cpu"))
    plain = TokeniseConfig(str(images), str(folder / "vocab"), str(dvae))
    crop = replace(plain, augment="transformer", crops=CROPS)

    def floor(crops: int) -> None:
        for first in range(0, n_photos, plain.batch):
            pictures = []
            for n, blob in enumerate(blobs[first : first + plain.batch]):
                if crops == 1:
                    pictures.append(square(blob, side))
                    continue
                image = decode(blob, 10**8)
                pictures += [transformer_crop(image, side, counter_random(0, n, each)) for each in range(crops)]
            for at in range(0, len(pictures), plain.batch):
                encode_codes(np.stack(pictures[at : at + plain.batch]), model, torch.device("cpu"))

    for config, what in ((plain, "the middle square"), (crop, f"{CROPS} random crops")):
        stage = afresh(lambda out, config=config: tokenise(replace(config, out=str(out))), folder / what)  # type: ignore[misc]
        with torch.no_grad():
            whole, bare = best_of(ROUNDS, stage, lambda crops=config.crops: floor(crops))  # type: ignore[misc]
        note = f"{n_photos / whole:,.0f} pictures/s a core, {n_photos / bare:,.0f} bare"
        yield Row(f"tokenise, {what}: share of the floor", bare / whole, BAR, True, note)


def rows(folder: Path, n_photos: int = 128, n_tokenised: int = 512, heldout_only: bool = False) -> Iterator[Row]:
    yield from preprocess_rows(folder, n_photos, heldout_only)
    yield from tokenise_rows(folder, n_tokenised)


if __name__ == "__main__":
    tell(__doc__, rows)
