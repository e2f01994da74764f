"""Several sources drawn from by weight: which one a position draws from is a pure function of the position.

Weights are exact: a pattern of sources repeats, in which each comes as often as its weight says, spread
as evenly as can be. Each source goes through epochs of its own, each of its samples once an epoch.
"""

import math
from collections.abc import Sequence
from fractions import Fraction
from itertools import accumulate

import numpy as np

from cluster.settings import SettingError
from data_pipeline.order import Order

MOST_PATTERN = 100_000  # positions after which a pattern must repeat


class Mixture:
    """Endless order over sources, each a list of shard sizes; shards are numbered through all sources."""

    def __init__(self, sources: Sequence[Sequence[int]], weights: Sequence[float], seed: int, window: int) -> None:
        self.shares = whole_shares(weights, len(sources))
        self.orders = [Order(sizes, seed, window, n) for n, sizes in enumerate(sources)]
        self.total = sum(order.total for order in self.orders)
        self._first_shards = [0, *accumulate(map(len, sources))]
        self.period = sum(self.shares)  # positions after which the pattern of sources repeats
        self._pattern = even_pattern(self.shares)
        self._within = np.zeros(self.period, np.int64)  # how often its source came before in the pattern
        for source in range(len(sources)):
            drawn = self._pattern == source
            self._within[drawn] = np.arange(drawn.sum())

    def __getitem__(self, position: int) -> tuple[int, int]:
        """(shard, sample in it) at a position of the endless order."""
        source, own = self.source_at(position)
        shard, sample = self.orders[source][own]
        return self._first_shards[source] + shard, sample

    def replacement(self, position: int, attempt: int) -> tuple[int, int]:
        """As `Order.replacement`, out of the source that the position draws from."""
        source, own = self.source_at(position)
        shard, sample = self.orders[source].replacement(own, attempt)
        return self._first_shards[source] + shard, sample

    def source_at(self, position: int) -> tuple[int, int]:
        """The source that a position draws from, and the position in that source's own order."""
        repeats, at = divmod(position, self.period)
        source = int(self._pattern[at])
        return source, repeats * self.shares[source] + int(self._within[at])


def order_of(sources: Sequence[Sequence[int]], weights: Sequence[float], seed: int, window: int) -> Order | Mixture:
    """The order over sources of shard sizes: mixed by weight, or without weights as one set of shards.

    SettingError if the weights do not fit the sources.
    """
    if weights:
        return Mixture(sources, weights, seed, window)
    return Order([size for sizes in sources for size in sizes], seed, window)


def whole_shares(weights: Sequence[float], count: int) -> tuple[int, ...]:
    """The smallest whole numbers in the ratio of the weights, read as the decimals that they print as.

    SettingError if there are not `count` of them, one is not above 0, or their pattern is too long.
    """
    text = ",".join(f"{weight:g}" for weight in weights)
    if len(weights) != count:
        raise SettingError(f"data.weights={text} has {len(weights)} numbers for {count} folders")
    if not all(math.isfinite(weight) and weight > 0 for weight in weights):
        raise SettingError(f"data.weights={text} must all be above 0; leave out a folder that is not to be drawn from")
    exact = [Fraction(str(weight)) for weight in weights]
    scale = math.lcm(*(share.denominator for share in exact))
    whole = [int(share * scale) for share in exact]
    shares = tuple(share // math.gcd(*whole) for share in whole)
    if sum(shares) > MOST_PATTERN:
        raise SettingError(f"data.weights={text} repeats after {sum(shares)} samples only; round to fewer digits")
    return shares


def even_pattern(shares: Sequence[int]) -> np.ndarray:
    """(sum of shares,) int16: source i comes shares[i] times, as evenly as possible.

    In the first n positions of its endless repetition a source of share s comes within
    1 - 1 / (2 k - 2) of n s / sum times, for k sources: Tijdeman 1980, "The chairman assignment
    problem". So in any n positions within 1 of it for two sources, and within 2 for more; for three
    and more sources no pattern keeps within 1 everywhere, but for a few ratios.
    """
    if len(shares) == 1:
        return np.zeros(shares[0], np.int16)
    length, slack = sum(shares), 2 * len(shares) - 2
    common = math.lcm(*shares)
    pattern = np.empty(length, np.int16)
    drawn = [0] * len(shares)
    for n in range(1, length + 1):
        due = [i for i, share in enumerate(shares) if slack * (n * share - drawn[i] * length) >= length]
        # of those that may come, the one that must come first: the deadline of draw c is (c + 1 - 1 / slack) / share
        pattern[n - 1] = first = min(due, key=lambda i: (slack * (drawn[i] + 1) - 1) * (common // shares[i]))
        drawn[first] += 1
    return pattern
