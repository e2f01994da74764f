"""Shards -> this rank's batches, in an order that needs no state but the step.

`ImageBatches` for the dVAE and the scorer, `TokenBatches` for the transformer. The next batches are
read in threads while the current one is used.
"""

import itertools
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from cluster.ledger import Bad, Seen, digest_of
from cluster.settings import SettingError, require_at_least_one, setting
from data_pipeline.bad_samples import usable_sample
from data_pipeline.bpe import Vocabulary
from data_pipeline.buffers import Buffers
from data_pipeline.contents import Codes, caption_of, picture_of, planes_of, random_planes_of
from data_pipeline.draws import Draws
from data_pipeline.folders import Shards
from data_pipeline.mixture import order_of
from data_pipeline.open_files import MOST_OPEN
from data_pipeline.order import AUGMENT, CROP, DROPOUT, EMPTY, FLIP
from data_pipeline.shards import Sample

BRIGHTEST = np.float32(255)
PAD = -1  # id of a text slot that holds no token


FETCH_AHEAD = 4096  # positions ahead of use whose shards are fetched, if they are on another machine


@dataclass(frozen=True)
class LoaderConfig:
    """How samples are visited."""

    batch: int = setting(64, "samples a step, over all ranks")
    seed: int = setting(0, "decides the order of samples and every random draw")
    shuffle_window: int = setting(16, "shards whose samples are mixed with each other")
    weights: tuple[float, ...] = setting((), "how often each of several folders is drawn from; none: by their sizes")
    max_bad_share: float = setting(0.01, "bad samples are replaced by others; the run stops at a larger share of them")
    readers: int = setting(1, "batches read ahead, each in a thread; changes no batch")

    def __post_init__(self) -> None:
        require_at_least_one(self, ("batch", "shuffle_window", "readers"), "data.")
        if not 0 <= self.max_bad_share <= 1:
            raise SettingError(f"data.max_bad_share={self.max_bad_share} must be between 0 and 1")


@dataclass(frozen=True)
class ImageBatch:
    """pixels (B, 3, P, P) float32 in [0, 1]; captions, B texts; keys, B names; seen, for the ledger."""

    pixels: Tensor
    captions: list[str]
    keys: list[str]
    seen: Seen = Seen()


@dataclass(frozen=True)
class TokenBatch:
    """text (B, T-1) int64 with PAD behind the caption; image (B, G*G) int64 codes; keys, B names; seen, for
    the ledger."""

    text: Tensor
    image: Tensor
    keys: list[str]
    seen: Seen = Seen()


B_co = TypeVar("B_co", ImageBatch, TokenBatch, covariant=True)
T = TypeVar("T")


class Batches(Generic[B_co]):
    """Endless batches of this rank, from step `step` on; `next()` gives step, step + 1, ..."""

    def __init__(self, shards: Shards, config: LoaderConfig, rank: int, world_size: int) -> None:
        if config.batch % world_size:
            raise SettingError(f"data.batch={config.batch} must be a multiple of the {world_size} processes")
        self.shards = shards
        self.config = config
        self.order = order_of(shards.source_sizes, config.weights, config.seed, config.shuffle_window)
        self.local = config.batch // world_size
        self.rank = rank
        self.step = 0
        self._readers = ThreadPoolExecutor(config.readers)
        self._ahead: deque[Future[B_co]] = deque()
        self._is_remote = any(shard.origin for shard in shards.shards)
        self._fetched = range(0)  # steps whose shards were asked for
        self._asked: deque[int] = deque(maxlen=MOST_OPEN)  # shards asked for of late
        self._asking = threading.Lock()

    @property
    def about_order(self) -> dict[str, Any]:
        """What decides the order of samples, for the head of a ledger."""
        return {
            "seed": self.config.seed,
            "shuffle_window": self.config.shuffle_window,
            "weights": list(self.config.weights),
            "samples": len(self.shards),
            "shards": self.shards.manifest.fingerprint,
        }

    def seek(self, step: int) -> None:
        """Go to the batch of a step: costs nothing, however far in."""
        for batch in self._ahead:
            batch.cancel()
        self._ahead.clear()
        self.step = step

    def __iter__(self) -> "Batches[B_co]":
        return self

    def __next__(self) -> B_co:
        self._read_ahead()
        batch = self._ahead.popleft().result()
        self.step += 1
        self._read_ahead()
        return batch

    def _read_ahead(self) -> None:
        while len(self._ahead) < self.config.readers:
            self._ahead.append(self._readers.submit(self.read, self.step + len(self._ahead)))

    def read(self, step: int) -> B_co:
        """The batch of a step; a pure function. ShardError if sample after sample is bad."""
        if self._is_remote:
            self._fetch_soon(step)
        return self.collate(self.positions(step))

    def _fetch_soon(self, step: int) -> None:
        """Have the shards fetched that the steps from this one on need."""
        last = step + 1 + FETCH_AHEAD // self.config.batch
        with self._asking:
            first = self._fetched.stop if step in self._fetched else step
            self._fetched = range(step, last)
            for position in itertools.chain.from_iterable(self.positions(later) for later in range(first, last)):
                shard, _ = self.order[position]
                if shard not in self._asked:
                    self._asked.append(shard)
                    self.shards.shards[shard].prefetch()

    def positions(self, step: int) -> range:
        """This rank's part of a step's positions in the endless order."""
        first = step * self.config.batch + self.rank * self.local
        return range(first, first + self.local)

    def collate(self, positions: range) -> B_co:
        raise NotImplementedError

    def usable(self, positions: range, make: Callable[[Sample, int], T]) -> tuple[list[T], list[str], Seen]:
        """What `make` makes of each position's sample or, if it raises ShardError, of a replacement; keys; record."""
        bad: list[Bad] = []
        found = [usable_sample(self.shards, self.order, position, make, bad) for position in positions]
        keys = [key for _, key, _ in found]
        digest = digest_of(positions, [place for place, *_ in found], keys)
        return [made for *_, made in found], keys, Seen(digest, tuple(bad))


class ImageBatches(Batches[ImageBatch]):
    """Pictures with their captions: the middle square or a random crop (Listing 1), flipped at random or not."""

    def __init__(
        self,
        shards: Shards,
        config: LoaderConfig,
        side: int,
        flip: bool,
        rank: int = 0,
        world_size: int = 1,
        crop: bool = False,
    ) -> None:
        super().__init__(shards, config, rank, world_size)
        self.side, self.flip, self.crop = side, flip, crop
        self._buffers = Buffers(config.readers + 2)  # those read ahead, the one in use and the one before it

    def collate(self, positions: range) -> ImageBatch:
        flips, crops = (Draws(self.config.seed, purpose, positions) for purpose in (FLIP, AUGMENT))
        pixels = self._buffers.empty((len(positions), 3, self.side, self.side))
        numbers = pixels.numpy()

        def make(sample: Sample, position: int) -> str:
            caption = caption_of(sample)
            if self.crop:
                planes = random_planes_of(sample, self.side, crops.at(position))
            else:
                planes = planes_of(sample, self.side)
            if self.flip and flips.at(position).random() < 0.5:
                planes = planes[:, :, ::-1]
            np.divide(planes, BRIGHTEST, out=numbers[positions.index(position)])
            return caption

        captions, keys, seen = self.usable(positions, make)
        return ImageBatch(pixels, captions, keys, seen)


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
        counts = shards.manifest.counts
        self.codes = Codes(counts.get("grid"), counts.get("codebook"))

    def collate(self, positions: range) -> TokenBatch:
        seed = self.config.seed
        make = token_maker(self.vocabulary, self.codes, self.bpe_dropout, seed, positions)
        rows, keys, seen = self.usable(positions, make)
        batch = token_batch(rows, keys, self.n_text, seen)
        if self.caption_dropout:
            draws = Draws(seed, EMPTY, positions)
            chances = [draws.at(position).random() for position in positions]
            batch.text[torch.tensor(chances) < self.caption_dropout] = PAD
        return batch


TokenRow = tuple[list[int], np.ndarray]  # ids of the text; codes (G * G,) int64


def token_maker(
    vocabulary: Vocabulary, codes: Codes, dropout: float, seed: int, positions: range
) -> Callable[[Sample, int], TokenRow]:
    """Makes ids and codes of a token sample at one of the positions; draws depend on (seed, position) alone."""
    merges, crops = Draws(seed, DROPOUT, positions), Draws(seed, CROP, positions)

    def make(sample: Sample, position: int) -> TokenRow:
        caption, grids = caption_of(sample), codes.read(sample)
        crop = int(crops.at(position).integers(len(grids))) if len(grids) > 1 else 0
        if dropout:
            return vocabulary.encode_with_dropout(caption, dropout, merges.at(position)), grids[crop].ravel()
        return vocabulary.encode(caption), grids[crop].ravel()

    return make


def token_batch(rows: list[TokenRow], keys: list[str], n_text: int, seen: Seen) -> TokenBatch:
    image = np.stack([codes for _, codes in rows]).astype(np.int64)
    return TokenBatch(pad_text([ids for ids, _ in rows], n_text), torch.from_numpy(image), keys, seen)


def tokens_batch(
    samples: list[Sample], vocabulary: Vocabulary, n_text: int, dropout: float, seed: int, positions: range
) -> TokenBatch:
    """Text and codes of token samples, which must be good; draws depend on (seed, position) alone."""
    make = token_maker(vocabulary, Codes(), dropout, seed, positions)
    rows = [make(sample, position) for sample, position in zip(samples, positions, strict=True)]
    return token_batch(rows, [sample.key for sample in samples], n_text, Seen())


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


def to_pixels(pictures: np.ndarray) -> Tensor:
    """(N, P, P, 3) uint8 -> (N, 3, P, P) float32 in [0, 1]."""
    return torch.from_numpy(np.ascontiguousarray(pictures.transpose(0, 3, 1, 2))).float() / 255


def first_pictures(shards: Shards, count: int, side: int) -> Tensor:
    """(n, 3, side, side) pixels of the first `count` samples in file order, or of all there are."""
    samples = itertools.islice(shards, count)
    return to_pixels(np.stack([picture_of(sample, side) for sample in samples]))
