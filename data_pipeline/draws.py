"""The generators of `counter_random` for a whole batch at a fifth of their cost, with the same numbers.

numpy spends 8 us to make a generator: most of it hashes the counter into the key of the Philox
cipher. Here the counters of a batch are hashed together, and one generator is set to each key.
"""

from typing import Any

import numpy as np

from data_pipeline.order import counter_random

WORD = 2**32

# numpy's SeedSequence: O'Neill 2015, "Developing a seed_seq alternative", and her randutils.hpp
POOL = 4
MIX_LEFT, MIX_RIGHT = np.uint32(0xCA01F9DD), np.uint32(0x4973F715)
HASH_A = np.array([[0x43B0D7E5 * pow(0x931E8875, n, WORD) % WORD] for n in range(POOL * POOL + 1)], np.uint32)
HASH_B = np.array([[0x8B51F9DD * pow(0x58F38DED, n, WORD) % WORD] for n in range(POOL + 1)], np.uint32)
OTHERS = [[target for target in range(POOL) if target != source] for source in range(POOL)]
HALF = np.uint32(16)


class Draws:
    """`counter_random(seed, purpose, position)` for positions that are known beforehand."""

    def __init__(self, seed: int, purpose: int, positions: range) -> None:
        self.counter = (seed, purpose)
        self.positions = positions
        self.fits = max(seed + 1, positions.stop) <= WORD  # else the hash mixes more words than are worth doing here
        self._keys: list[list[int]] = []  # made when the first number is drawn
        self._bits = np.random.Philox(0)
        self._generator = np.random.Generator(self._bits)
        start = self._bits.state  # of lists, which are taken twice as fast as arrays
        self._start: Any = start | {"state": {"counter": [0] * 4, "key": [0] * 2}, "buffer": [0] * 4}

    def at(self, position: int) -> np.random.Generator:
        """The generator of a position, at its start; good until the next call."""
        if not self.fits:
            return counter_random(*self.counter, position)
        if not self._keys:
            self._keys = philox_keys(self.counter, np.array(self.positions, np.uint32)).tolist()
        self._start["state"]["key"] = self._keys[self.positions.index(position)]
        self._bits.state = self._start
        return self._generator


def philox_keys(first: tuple[int, int], last: np.ndarray) -> np.ndarray:
    """(N, 2) uint64: `SeedSequence((*first, n)).generate_state(2, np.uint64)` for each n of last (N,) uint32."""
    words = np.zeros((POOL, len(last)), np.uint32)
    words[0], words[1], words[2] = *first, last
    pool = _hashed(words, HASH_A[:POOL], HASH_A[1 : POOL + 1])
    used = POOL
    for source, others in enumerate(OTHERS):
        right = MIX_RIGHT * _hashed(pool[source], HASH_A[used : used + 3], HASH_A[used + 1 : used + 4])
        mixed = MIX_LEFT * pool[others] - right
        pool[others] = mixed ^ (mixed >> HALF)
        used += 3
    return np.ascontiguousarray(_hashed(pool, HASH_B[:POOL], HASH_B[1:]).T, "<u4").view("<u8")


def _hashed(words: np.ndarray, before: np.ndarray, after: np.ndarray) -> np.ndarray:
    words = (words ^ before) * after
    return words ^ (words >> HALF)
