"""Shards -> this rank's batches, in an order that needs no state but the step.

`ImageBatches` for the dVAE and the scorer, `TokenBatches` for the transformer. The next batch is
read in a thread while the current one is used.
"""

import io
import itertools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from cluster.manifest import FolderError, check_files, read_manifest
from cluster.settings import SettingError, require_at_least_one, setting
from data_pipeline.bpe import Vocabulary
from data_pipeline.images import IMAGE_ENDINGS, square
from data_pipeline.order import CROP, DROPOUT, EMPTY, FLIP, Order, counter_random
from data_pipeline.shards import Sample, Shard, ShardError, open_shard

PAD = -1  # id of a text slot that holds no token


@dataclass(frozen=True)
class LoaderConfig:
    """How samples are visited."""

    batch: int = setting(64, "samples a step, over all ranks")
    seed: int = setting(0, "decides the order of samples and every random draw")
    shuffle_window: int = setting(16, "shards whose samples are mixed with each other")

    def __post_init__(self) -> None:
        require_at_least_one(self, ("batch", "shuffle_window"), "data.")


@dataclass(frozen=True)
class ImageBatch:
    """pixels (B, 3, P, P) float32 in [0, 1]; captions, B texts; keys, B names."""

    pixels: Tensor
    captions: list[str]
    keys: list[str]


@dataclass(frozen=True)
class TokenBatch:
    """text (B, T-1) int64 with PAD behind the caption; image (B, G*G) int64 codes; keys, B names."""

    text: Tensor
    image: Tensor
    keys: list[str]


B_co = TypeVar("B_co", ImageBatch, TokenBatch, covariant=True)


class Shards:
    """All samples of one split of a folder, addressed by (shard, number)."""

    def __init__(self, folder: Path, kind: str, split: str) -> None:
        manifest = read_manifest(folder, kind)
        check_files(folder, manifest)
        names = sorted(name for name in manifest.files if name.startswith(f"{split}-"))
        self.folder = folder
        self.manifest = manifest
        self.shards: list[Shard] = [open_shard(folder / name) for name in names]
        if not self.shards:
            raise FolderError(f"{folder} has no {split} shards (it holds: {', '.join(manifest.files) or 'nothing'})")

    @property
    def sizes(self) -> list[int]:
        return [len(shard) for shard in self.shards]

    def __len__(self) -> int:
        return sum(self.sizes)

    def read(self, place: tuple[int, int]) -> Sample:
        return self.shards[place[0]].read(place[1])

    def __iter__(self) -> Iterator[Sample]:
        """Every sample once, in the order of the files."""
        for shard in self.shards:
            for number in range(len(shard)):
                yield shard.read(number)


class Batches(Generic[B_co]):
    """Endless batches of this rank, from step `step` on; `next()` gives step, step + 1, ..."""

    def __init__(self, shards: Shards, config: LoaderConfig, rank: int, world_size: int) -> None:
        if config.batch % world_size:
            raise SettingError(f"data.batch={config.batch} must be a multiple of the {world_size} processes")
        self.shards = shards
        self.config = config
        self.order = Order(shards.sizes, config.seed, config.shuffle_window)
        self.local = config.batch // world_size
        self.rank = rank
        self.step = 0
        self._reader = ThreadPoolExecutor(1)
        self._ahead: Any = None

    def seek(self, step: int) -> None:
        """Go to the batch of a step: costs nothing, however far in."""
        self.step, self._ahead = step, None

    def __iter__(self) -> "Batches[B_co]":
        return self

    def __next__(self) -> B_co:
        batch = (self._ahead or self._reader.submit(self.read, self.step)).result()
        self.step += 1
        self._ahead = self._reader.submit(self.read, self.step)
        return batch

    def read(self, step: int) -> B_co:
        """The batch of a step; a pure function."""
        first = step * self.config.batch + self.rank * self.local
        return self.collate(range(first, first + self.local))

    def collate(self, positions: range) -> B_co:
        raise NotImplementedError


class ImageBatches(Batches[ImageBatch]):
    """Pictures, squared and flipped at random, with their captions."""

    def __init__(
        self, shards: Shards, config: LoaderConfig, side: int, flip: bool, rank: int = 0, world_size: int = 1
    ) -> None:
        super().__init__(shards, config, rank, world_size)
        self.side, self.flip = side, flip

    def collate(self, positions: range) -> ImageBatch:
        samples = [self.shards.read(self.order[position]) for position in positions]
        pixels = np.stack([picture_of(sample, self.side) for sample in samples])
        if self.flip:
            flips = [counter_random(self.config.seed, FLIP, position).random() < 0.5 for position in positions]
            pixels[flips] = pixels[flips, :, ::-1]
        return ImageBatch(to_pixels(pixels), [caption_of(s) for s in samples], [s.key for s in samples])


class TokenBatches(Batches[TokenBatch]):
    """Captions encoded with BPE dropout, some of them emptied, and one crop's image codes."""

    def __init__(
        self,
        shards: Shards,
        config: LoaderConfig,
        vocabulary: Vocabulary,
        n_text: int,
        bpe_dropout: float,
        caption_dropout: float = 0.0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        super().__init__(shards, config, rank, world_size)
        self.vocabulary, self.n_text = vocabulary, n_text
        self.bpe_dropout, self.caption_dropout = bpe_dropout, caption_dropout

    def collate(self, positions: range) -> TokenBatch:
        samples = [self.shards.read(self.order[position]) for position in positions]
        seed, dropout = self.config.seed, self.bpe_dropout
        batch = tokens_batch(samples, self.vocabulary, self.n_text, dropout, seed, positions)
        if self.caption_dropout:
            chances = [counter_random(seed, EMPTY, position).random() for position in positions]
            batch.text[torch.tensor(chances) < self.caption_dropout] = PAD
        return batch


def tokens_batch(
    samples: list[Sample], vocabulary: Vocabulary, n_text: int, dropout: float, seed: int, positions: range
) -> TokenBatch:
    """Text and codes of token samples; draws depend on (seed, position) alone."""
    text = []
    codes = []
    for sample, position in zip(samples, positions, strict=True):
        random = counter_random(seed, DROPOUT, position)
        caption = caption_of(sample)
        text.append(vocabulary.encode_with_dropout(caption, dropout, random) if dropout else vocabulary.encode(caption))
        crops = np.load(io.BytesIO(sample.files["npy"]), allow_pickle=False)
        codes.append(crops[counter_random(seed, CROP, position).integers(len(crops))].astype(np.int64).ravel())
    return TokenBatch(pad_text(text, n_text), torch.from_numpy(np.stack(codes)), [s.key for s in samples])


def words_in(batch: TokenBatch) -> int:
    """Text tokens of a batch, pads left out."""
    return int((batch.text != PAD).sum())


def pad_text(ids: list[list[int]], n_text: int) -> Tensor:
    """(B, n_text - 1) int64: each text cut to n_text - 1 ids (slot 0 is start-of-text), then PAD."""
    text = torch.full((len(ids), n_text - 1), PAD, dtype=torch.int64)
    for row, row_ids in zip(text, ids, strict=True):
        kept = row_ids[: n_text - 1]
        row[: len(kept)] = torch.tensor(kept, dtype=torch.int64)
    return text


def picture_of(sample: Sample, side: int) -> np.ndarray:
    """(side, side, 3) uint8 picture of an images/ sample."""
    for ending in IMAGE_ENDINGS:
        if ending in sample.files:
            return square(sample.files[ending], side)
    raise ShardError(f"sample {sample.key} has no picture, only {', '.join(sample.files)}")


def caption_of(sample: Sample) -> str:
    return sample.files["txt"].decode()


def to_pixels(pictures: np.ndarray) -> Tensor:
    """(N, P, P, 3) uint8 -> (N, 3, P, P) float32 in [0, 1]."""
    return torch.from_numpy(np.ascontiguousarray(pictures.transpose(0, 3, 1, 2))).float() / 255


def first_pictures(shards: Shards, count: int, side: int) -> Tensor:
    """(n, 3, side, side) pixels of the first `count` samples in file order, or of all there are."""
    samples = itertools.islice(shards, count)
    return to_pixels(np.stack([picture_of(sample, side) for sample in samples]))
