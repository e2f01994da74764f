"""The order in which samples are visited: a pure function of (seed, epoch, position).

Shards are permuted, then the samples inside each window of neighbouring shards; each sample once an
epoch. Step s of a run with global batch B takes positions [s * B, (s + 1) * B) of the endless order,
whatever the number of ranks or workers, so a run resumes at the exact sample on any world size.
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

# purposes of random numbers, so that no two uses draw the same
SHUFFLE, CROP, DROPOUT, FLIP, AUGMENT, GUMBEL, SAMPLE, EMPTY = range(8)


def counter_random(*counter: int) -> np.random.Generator:
    """A generator that depends on the given numbers alone (seed, purpose, epoch, ...)."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(counter)))


class Order:
    """Endless order over shards of the given sizes."""

    def __init__(self, sizes: Sequence[int], seed: int, window: int) -> None:
        self.sizes = tuple(sizes)
        self.total = sum(sizes)
        self.seed = seed
        self.window = window
        self._epoch = lru_cache(maxsize=2)(self._permute)

    def __getitem__(self, position: int) -> tuple[int, int]:
        """(shard, sample in it) at a position of the endless order."""
        epoch, at = divmod(position, self.total)
        shard, sample = self._epoch(epoch)[at]
        return int(shard), int(sample)

    def _permute(self, epoch: int) -> np.ndarray:
        """(total, 2) int32 rows of (shard, sample) of one epoch."""
        random = counter_random(self.seed, SHUFFLE, epoch)
        shards = random.permutation(len(self.sizes))
        pairs = []
        for first in range(0, len(shards), self.window):
            group = shards[first : first + self.window]
            rows = [np.stack([np.full(self.sizes[s], s), np.arange(self.sizes[s])], 1) for s in group]
            pairs.append(random.permutation(np.concatenate(rows).astype(np.int32)))
        return np.concatenate(pairs)
