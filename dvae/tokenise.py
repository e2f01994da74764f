"""Image shards -> token shards: each picture as a grid of code numbers, or as several of random crops.

    smalti tokenise images=data/images dvae=runs/dvae out=data/tokens

Writes tars with KEY.npy (uint16, crops x G x G) and KEY.txt, stamped with the fingerprint of the
dVAE. Killed and run again, it keeps the finished shards. Shared by the ranks of a launch, or by tasks
(tasks=8 task=0, ...; `smalti tokenise merge` ends it): the result is the same bytes. The embedded
emoji take some seconds.
"""

import io
import itertools
import json
import sys
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from cluster.command import Command, run_command
from cluster.manifest import (
    FolderError,
    Manifest,
    is_done,
    read_manifest,
    sweep,
    write_bytes,
    write_json,
    write_manifest,
)
from cluster.metrics import Progress
from cluster.process import Place, meet, meeting_place
from cluster.settings import SettingError, from_dict, require_at_least_one, setting
from data_pipeline.augment import transformer_crop
from data_pipeline.bpe import Vocabulary, open_vocabulary
from data_pipeline.contents import image_of, picture_of
from data_pipeline.convert import SPLITS
from data_pipeline.folders import LocalFolder, shard_names
from data_pipeline.loader import to_pixels
from data_pipeline.order import AUGMENT, counter_random
from data_pipeline.shards import Sample, Shard, index_record, open_shard, write_shard
from data_pipeline.shares import check_share, refuse_gaps, share_of
from dvae.config import DvaeConfig
from dvae.likelihood import map_pixels
from dvae.model import Dvae
from dvae.train import open_dvae

DONE = {"count", "too_small", "captions_by_tokens"}  # what a shard's record tells, beside its bytes and sha256


@dataclass(frozen=True)
class TokeniseConfig:
    """What is read and written."""

    images: str = setting("data/images", "image shards, from `smalti preprocess`")
    vocab: str = setting("data/vocab", "the BPE the captions will be read with")
    dvae: str = setting("runs/dvae", "trained dVAE")
    out: str = setting("data/tokens", "folder to write")
    batch: int = setting(128, "pictures encoded at a time")
    augment: Literal["center", "transformer"] = setting(
        "center", "center: the middle square; transformer: random crops near it (Listing 2)"
    )
    crops: int = setting(1, "random crops of each picture; training draws one at each visit")
    seed: int = setting(0, "decides the random crops")
    tasks: int = setting(0, "so many tasks share the work, each with its task=; `smalti tokenise merge` ends it")
    task: int = setting(-1, "number of this task, from 0; it does its share and no more")

    def __post_init__(self) -> None:
        require_at_least_one(self, ("batch", "crops"))
        check_share(self.tasks, self.task)
        if self.crops > 1 and self.augment == "center":
            raise SettingError(f"crops={self.crops} needs augment=transformer: the middle square is always the same")


class Work:
    """What a folder of tokens is made from, and its shards as they are done."""

    def __init__(self, config: TokeniseConfig) -> None:
        self.config, self.out = config, Path(config.out)
        self.images = Path(config.images)
        self.manifest: Manifest = LocalFolder(self.images, "images").manifest
        dvae = read_manifest(Path(config.dvae), "dvae")
        self.shape = from_dict(DvaeConfig, dvae.settings["model"])
        self.vocabulary, vocab = open_vocabulary(Path(config.vocab))
        self.made_from = {"images": self.manifest.fingerprint, "dvae": dvae.fingerprint, "vocab": vocab}
        crops = {"augment": config.augment, "crops": config.crops, "seed": config.seed}
        self.settings = crops if config.augment != "center" else {}
        self.names = [name for split in SPLITS for name in shard_names(self.manifest, split)]

    def is_done(self) -> bool:
        if not is_done(self.out, "tokens", self.settings, self.made_from):
            return False
        print(f"{self.out} is finished already")
        return True

    def claim(self) -> None:
        """Refuse to mix shards of two dVAEs or image sets in one unfinished folder."""
        self.out.mkdir(parents=True, exist_ok=True)
        path, origin = self.out / "begun.json", json.dumps(self.made_from | self.settings)
        if path.is_file() and path.read_text() != origin:
            raise FolderError(
                f"{self.out} was begun with another dvae, images, vocab or crops; use another `out` or remove it"
            )
        write_bytes(path, origin.encode())

    def record(self, name: str) -> dict[str, Any] | None:
        """What is known of a shard that is done; None if it is not, or if its tar is gone or of another size."""
        path = self.out / name
        try:
            record = json.loads(path.with_suffix(".done.json").read_text())
            whole = (
                not record["count"] or path.stat().st_size == record["bytes"] and path.with_suffix(".json").is_file()
            )
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return record if whole and record.keys() >= DONE else None


def tokenise(config: TokeniseConfig) -> None:
    """Run the stage; see the module's text."""
    with meeting_place(on_cpu=False) as place:
        work = Work(config)
        share = share_of(work.names, config.tasks, config.task, place)
        done = work.is_done()
        if not done:
            encode_share(work, share, place)
        if config.tasks or done:
            return
        meet(place)
        if place.is_main:
            finish(work)


def encode_share(work: Work, names: list[str], place: Place) -> None:
    """The shards of these names that are not done."""
    work.claim()
    model, _ = open_dvae(Path(work.config.dvae), place.device)
    shards = [open_shard(work.images / name) for name in names]
    progress = Progress("tokenise", sum(map(len, shards)), unit="picture")
    for shard in shards:
        if work.record(shard.path.name) is None:
            write_tokens(work, shard, model, place.device)
        progress.advance(len(shard))
    progress.close()
    if work.config.tasks:
        print(f"task {work.config.task} of {work.config.tasks}: {len(names)} of {len(work.names)} shards are done; "
              "when all tasks are, `smalti tokenise merge` with the same words ends it")  # fmt: skip


def write_tokens(work: Work, shard: Shard, model: Dvae, device: torch.device) -> None:
    """The token shard of an image shard, and its record."""
    path = work.out / shard.path.name
    coded = encode_shard(shard, model, work.config, device)
    written = write_shard(path, coded)
    lengths = captions_by_tokens(coded, work.vocabulary)
    record = {"count": len(coded), "too_small": len(shard) - len(coded), "captions_by_tokens": lengths}
    write_json(path.with_suffix(".done.json"), record | (index_record(path) if written else {}))


def merge(config: TokeniseConfig) -> None:
    """Write the manifest over the shards of all tasks; FolderError while one is missing."""
    work = Work(config)
    if not work.is_done():
        finish(work)


def finish(work: Work) -> None:
    """Records -> manifest."""
    records = {name: work.record(name) for name in work.names}
    missing = {number: name for number, name in enumerate(work.names) if records[name] is None}
    refuse_gaps(missing, len(work.names), "tokenise", work.config.tasks)
    work.claim()
    found = {name: record for name, record in sorted(records.items()) if record}
    of_split = {split: [found[name] for name in found if name.startswith(f"{split}-")] for split in SPLITS}
    counts: dict[str, Any] = {split: sum(r["count"] for r in of_split[split]) for split in SPLITS if of_split[split]}
    if not counts.get("train"):
        raise FolderError(
            f"no training picture of {work.images} has {work.shape.image_side} pixels along its short side"
        )
    counts |= {"codebook": work.shape.codebook, "grid": work.shape.grid, "crops": work.config.crops}
    lengths = itertools.zip_longest(*(record["captions_by_tokens"] for record in of_split["train"]), fillvalue=0)
    counts["captions_by_tokens"] = [sum(column) for column in lengths]
    too_small = sum(record["too_small"] for record in found.values())
    if too_small:
        counts["too_small"] = too_small
        print(f"{too_small} pictures are left out: their short side is below the dVAE's {work.shape.image_side} pixels")
    files = {
        name: {key: record[key] for key in ("bytes", "sha256")} for name, record in found.items() if record["count"]
    }
    sweep(work.out)
    write_manifest(work.out, "tokens", work.settings, counts, files, work.made_from)
    n_pictures = counts["train"] + counts.get("heldout", 0)
    print(f"{n_pictures} pictures as {work.shape.grid}x{work.shape.grid} codes in {work.out}")


@torch.no_grad()
def encode_shard(shard: Shard, model: Dvae, config: TokeniseConfig, device: torch.device) -> list[Sample]:
    """Token samples of one image shard, in its order, without pictures that are too small to be cropped."""
    coded = []
    for first in range(0, len(shard), config.batch):
        samples = [shard.read(number) for number in range(first, min(first + config.batch, len(shard)))]
        crops = [crops_of(sample, model.config.image_side, config) for sample in samples]
        pictures = [crop for each in crops for crop in each]
        parts = [pictures[at : at + config.batch] for at in range(0, len(pictures), config.batch)]
        codes = itertools.chain.from_iterable(encode(np.stack(part), model, device) for part in parts)
        for sample, each in zip(samples, crops, strict=True):
            if each:
                grids = np.stack(list(itertools.islice(codes, len(each))))
                coded.append(Sample(sample.key, {"npy": npy_bytes(grids), "txt": sample.files["txt"]}))
    return coded


def encode(pictures: np.ndarray, model: Dvae, device: torch.device) -> np.ndarray:
    """(N, P, P, 3) uint8 -> (N, G, G) uint16 codes."""
    mapped = map_pixels(to_pixels(pictures).to(device)).contiguous(memory_format=torch.channels_last)
    return model.encode(mapped).cpu().numpy().astype(np.uint16)


def crops_of(sample: Sample, side: int, config: TokeniseConfig) -> list[np.ndarray]:
    """What is coded of a picture, each (side, side, 3) uint8; nothing of one that is too small to be cropped.

    A crop depends on (seed, key, number of the crop) alone: not on shards, batches or tasks.
    """
    if config.augment == "center":
        return [picture_of(sample, side)]
    image = image_of(sample)
    if min(image.size) < side:
        return []
    key = int.from_bytes(sha256(sample.key.encode()).digest()[:8])
    draws = (counter_random(config.seed, AUGMENT, key, crop) for crop in range(config.crops))
    return [transformer_crop(image, side, random) for random in draws]


def captions_by_tokens(samples: list[Sample], vocabulary: Vocabulary) -> list[int]:
    """How many captions have 0, 1, 2, ... tokens: from it training says how many it must cut."""
    lengths = [len(vocabulary.encode(sample.files["txt"].decode())) for sample in samples]
    return np.bincount(np.array(lengths, np.int64)).tolist()


def npy_bytes(array: np.ndarray) -> bytes:
    """The array as the content of a .npy file."""
    out = io.BytesIO()
    np.save(out, array, allow_pickle=False)
    return out.getvalue()


COMMAND = Command("tokenise", TokeniseConfig, Path(__file__).parent / "configs" / "tokenise", tokenise, __doc__)

if __name__ == "__main__":
    sys.exit(run_command(COMMAND, sys.argv[1:]))
