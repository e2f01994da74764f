"""Image shards -> token shards: each picture as a grid of code numbers.

    smalti tokenise images=data/images dvae=runs/dvae out=data/tokens

Writes tars with KEY.npy (uint16, crops x G x G) and KEY.txt, stamped with the fingerprint of the
dVAE. Killed and run again, it keeps the finished shards. The embedded emoji take some seconds.
"""

import io
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cluster.command import Command, run_command
from cluster.manifest import FolderError, is_done, read_manifest, write_bytes, write_manifest
from cluster.metrics import Progress
from cluster.process import lone_place
from cluster.settings import require_at_least_one, setting
from data_pipeline.bpe import Vocabulary, open_vocabulary
from data_pipeline.loader import Shards, picture_of, to_pixels
from data_pipeline.shards import Sample, Shard, is_finished, write_shard
from dvae.likelihood import map_pixels
from dvae.model import Dvae
from dvae.train import open_dvae


@dataclass(frozen=True)
class TokeniseConfig:
    """What is read and written."""

    images: str = setting("data/images", "image shards, from `smalti preprocess`")
    vocab: str = setting("data/vocab", "the BPE the captions will be read with")
    dvae: str = setting("runs/dvae", "trained dVAE")
    out: str = setting("data/tokens", "folder to write")
    batch: int = setting(128, "pictures encoded at a time")

    def __post_init__(self) -> None:
        require_at_least_one(self, ("batch",))


def tokenise(config: TokeniseConfig) -> None:
    """Run the stage; see the module's text."""
    place = lone_place()
    model, dvae = open_dvae(Path(config.dvae), place.device)
    vocabulary, vocab = open_vocabulary(Path(config.vocab))
    images, out = Path(config.images), Path(config.out)
    manifest = read_manifest(images, "images")
    made_from = {"images": manifest.fingerprint, "dvae": dvae.fingerprint, "vocab": vocab}
    if is_done(out, "tokens", {}, made_from):
        print(f"{out} is finished already")
        return
    out.mkdir(parents=True, exist_ok=True)
    _claim(out / "begun.txt", dvae.fingerprint + " " + manifest.fingerprint)
    splits = {split: Shards(images, "images", split) for split in ("train", "heldout") if manifest.counts[split]}
    progress = Progress("tokenise", sum(len(shards) for shards in splits.values()), unit="picture")
    for shards in splits.values():
        for shard in shards.shards:
            if not is_finished(out / shard.path.name):
                write_shard(out / shard.path.name, encode_shard(shard, model, config.batch, place.device))
            progress.advance(len(shard))
    progress.close()
    counts: dict[str, Any] = {split: len(shards) for split, shards in splits.items()}
    counts |= {"codebook": model.config.codebook, "grid": model.config.grid, "crops": 1}
    counts["captions_by_tokens"] = captions_by_tokens(splits["train"], vocabulary)
    names = sorted(name for shards in splits.values() for name in (s.path.name for s in shards.shards))
    write_manifest(out, "tokens", {}, counts, names, made_from)
    print(f"{sum(map(len, splits.values()))} pictures as {model.config.grid}x{model.config.grid} codes in {out}")


@torch.no_grad()
def encode_shard(shard: Shard, model: Dvae, batch: int, device: torch.device) -> list[Sample]:
    """Token samples of one image shard, in its order."""
    coded = []
    for first in range(0, len(shard), batch):
        samples = [shard.read(number) for number in range(first, min(first + batch, len(shard)))]
        pictures = np.stack([picture_of(sample, model.config.image_side) for sample in samples])
        mapped = map_pixels(to_pixels(pictures).to(device)).contiguous(memory_format=torch.channels_last)
        codes = model.encode(mapped).cpu().numpy().astype(np.uint16)
        coded += [
            Sample(sample.key, {"npy": npy_bytes(grid[None]), "txt": sample.files["txt"]})
            for sample, grid in zip(samples, codes, strict=True)
        ]
    return coded


def captions_by_tokens(shards: Shards, vocabulary: Vocabulary) -> list[int]:
    """How many captions have 0, 1, 2, ... tokens: from it training says how many it must cut."""
    lengths = [len(vocabulary.encode(shard.read_text(i))) for shard in shards.shards for i in range(len(shard))]
    return np.bincount(lengths).tolist()


def npy_bytes(array: np.ndarray) -> bytes:
    """The array as the content of a .npy file."""
    out = io.BytesIO()
    np.save(out, array, allow_pickle=False)
    return out.getvalue()


def _claim(path: Path, origin: str) -> None:
    """Refuse to mix shards of two dVAEs or image sets in one unfinished folder."""
    if path.is_file() and path.read_text() != origin:
        raise FolderError(f"{path.parent} was begun with another dvae or images; use another `out` or remove it")
    write_bytes(path, origin.encode())


COMMAND = Command("tokenise", TokeniseConfig, Path(__file__).parent / "configs" / "tokenise", tokenise, __doc__)

if __name__ == "__main__":
    sys.exit(run_command(COMMAND, sys.argv[1:]))
