"""The order in which samples are visited: a pure function of (seed, epoch, position).

Shards are permuted, then the samples inside each window of neighbouring shards; each sample once an
epoch. Step s of a run with global batch B takes positions [s * B, (s + 1) * B) of the endless order,
whatever the number of ranks or readers, so a run resumes at the exact sample on any world size.
"""

from bisect import bisect_right
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate

import numpy as np

# purposes of random numbers, so that no two uses draw the same
SHUFFLE, CROP, DROPOUT, FLIP, AUGMENT, GUMBEL, SAMPLE, EMPTY, REPLACE = range(9)


def counter_random(*counter: int) -> np.random.Generator:
    """A generator that depends on the given numbers alone (seed, purpose, epoch, ...)."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(counter)))


class Order:
    """Endless order over shards of the given sizes; `source` sets apart the orders of sources that are mixed."""

    def __init__(self, sizes: Sequence[int], seed: int, window: int, source: int = 0) -> None:
        self.sizes = tuple(sizes)
        self.total = sum(sizes)
        self.seed = seed
        self.window = window
        self._source = (source,) if source else ()
        self._starts = [0, *accumulate(self.sizes)]
        self._epoch = lru_cache(maxsize=2)(self._permute)

    def __getitem__(self, position: int) -> tuple[int, int]:
        """(shard, sample in it) at a position of the endless order."""
        epoch, at = divmod(position, self.total)
        shard, sample = self._epoch(epoch)[at]
        return int(shard), int(sample)

    def replacement(self, position: int, attempt: int) -> tuple[int, int]:
        """What stands in at a position whose sample, and whose first attempt - 1 replacements, are bad.

        Any sample, drawn from (seed, position, attempt) alone: a rank need not know what others met.
        """
        random = counter_random(self.seed, REPLACE, position, attempt, *self._source)
        sample = int(random.integers(self.total))
        shard = bisect_right(self._starts, sample) - 1
        return shard, sample - self._starts[shard]

    def _permute(self, epoch: int) -> np.ndarray:
        """(total, 2) int32 rows of (shard, sample) of one epoch."""
        random = counter_random(self.seed, SHUFFLE, epoch, *self._source)
        shards = random.permutation(len(self.sizes))
        pairs = []
        for first in range(0, len(shards), self.window):
            group = shards[first : first + self.window]
            rows = [np.stack([np.full(self.sizes[s], s), np.arange(self.sizes[s])], 1) for s in group]
            pairs.append(random.permutation(np.concatenate(rows).astype(np.int32)))
        return np.concatenate(pairs)
