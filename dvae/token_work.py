"""What a folder of tokens is made from and how: settings, precision, crops, what is done."""

import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

import numpy as np

from cluster.manifest import NAME, FolderError, Manifest, is_done, read_manifest, write_bytes
from cluster.process import Place
from cluster.settings import SettingError, UserError, from_dict, require_at_least_one, setting
from data_pipeline.augment import NINE_EIGHTHS, check_room, transformer_crop
from data_pipeline.bpe import open_vocabulary
from data_pipeline.contents import image_of, picture_of
from data_pipeline.convert import SPLITS
from data_pipeline.folders import LocalFolder, shard_names
from data_pipeline.order import AUGMENT, counter_random
from data_pipeline.shards import Sample, open_shard
from data_pipeline.shares import check_share
from dvae.check_codes import N_CODES, equal_share
from dvae.config import DvaeConfig

DONE = {"count", "too_small", "captions_by_tokens"}  # what a shard's record tells, beside its bytes and sha256
EQUAL = "codes_equal_to_fp32"


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
    precision: Literal["fp32", "bf16", "auto"] = setting(
        "fp32", "auto: bf16 where the hardware multiplies it and min_equal holds, else fp32"
    )
    min_equal: float = setting(0.999, "share of a sample's codes that bf16 must give as fp32 does")
    tasks: int = setting(0, "so many tasks share the work, each with its task=; `smalti tokenise merge` ends it")
    task: int = setting(-1, "number of this task, from 0; it does its share and no more")

    def __post_init__(self) -> None:
        require_at_least_one(self, ("batch", "crops"))
        check_share(self.tasks, self.task)
        if not 0 <= self.min_equal <= 1:
            raise SettingError(f"min_equal={self.min_equal} must be from 0 to 1")
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
        crops: dict[str, Any] = {"augment": config.augment, "crops": config.crops, "seed": config.seed}
        self.settings = crops if config.augment != "center" else {}
        self.warning = ""
        if config.augment == "transformer":
            self.warning = check_room(self.manifest, self.shape.image_side, NINE_EIGHTHS)
        self.names = [name for split in SPLITS for name in shard_names(self.manifest, split)]
        self.precision, self.equal = "fp32", dict[str, float]()  # until settled; what counts tell of bf16

    def settle(self, place: Place, is_fast: bool) -> None:
        """Decide what codes are computed in: as the folder was begun, or else by a measurement.

        The sample is the same for every task. UserError if precision=bf16 gives too many other codes.
        """
        config, begun = self.config, self.begun()
        wanted = config.precision
        if wanted == "auto":
            wanted = begun.get("precision", "fp32") if begun else "bf16" if is_fast else "fp32"
        if wanted == "fp32":
            return
        share = begun.get(EQUAL)
        if share is None:
            pictures = [crop for *_, crop in self.first_crops("train", -(-N_CODES // self.shape.grid**2))]
            if not pictures:
                raise self.nothing_fits()
            share = equal_share(Path(config.dvae), pictures, place.device)
        told = f"bf16 gives {share:.3%} of a sample's codes as fp32 does"
        if share < config.min_equal:
            told += f", less than min_equal={config.min_equal}"
            if config.precision == "bf16":
                raise UserError(f"{told}; use precision=fp32")
            told += ", so fp32 is used"
        else:
            self.precision, self.equal = "bf16", {EQUAL: share}
            self.settings = self.settings | {"precision": "bf16"}
        if place.is_main:
            print(told)

    def first_crops(self, split: str, count: int) -> Iterator[tuple[str, str, np.ndarray]]:
        """(shard, key, first crop) of the first pictures of a split that are coded."""
        shards = ((name, open_shard(self.images / name)) for name in shard_names(self.manifest, split))
        samples = ((name, shard.read(number)) for name, shard in shards for number in range(len(shard)))
        first = replace(self.config, crops=1)
        crops = ((name, one.key, crop) for name, one in samples for crop in crops_of(one, self.shape.image_side, first))
        return itertools.islice(crops, count)

    def nothing_fits(self) -> FolderError:
        """The error of images that are all too small to be cropped."""
        return FolderError(
            f"no training picture of {self.images} has {self.shape.image_side} pixels along its short side"
        )

    def is_done(self) -> bool:
        if not is_done(self.out, "tokens", self.settings, self.made_from):
            return False
        print(f"{self.out} is finished already")
        return True

    def begun(self) -> dict[str, Any]:
        """What the folder, finished or not, was begun with; {} if nobody did."""
        if (self.out / NAME).is_file():
            manifest = read_manifest(self.out, "tokens")
            return manifest.made_from | manifest.settings | {EQUAL: manifest.counts.get(EQUAL)}
        path = self.out / "begun.json"
        try:
            return json.loads(path.read_text()) if path.is_file() else {}
        except ValueError:
            raise FolderError(f"{path} is damaged; remove {self.out}") from None

    def claim(self) -> None:
        """Refuse to mix shards of two dVAEs or image sets in one unfinished folder."""
        self.out.mkdir(parents=True, exist_ok=True)
        begun, origin = self.begun(), self.made_from | self.settings
        if begun and {name: value for name, value in begun.items() if name != EQUAL} != origin:
            raise FolderError(
                f"{self.out} was begun with another dvae, images, vocab, crops or precision; "
                "use another `out` or remove it"
            )
        write_bytes(self.out / "begun.json", json.dumps(origin | self.equal).encode())

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
        alike = record.get("precision", "fp32") == self.precision  # a task may have begun in the same instant
        return record if whole and alike and record.keys() >= DONE else None


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
