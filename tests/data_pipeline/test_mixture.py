"""Mixtures: weights kept exactly and evenly, each source through epochs of its own."""

from collections import Counter
from fractions import Fraction

import numpy as np
import pytest

from cluster.settings import SettingError
from data_pipeline.mixture import Mixture, even_pattern, order_of, whole_shares
from data_pipeline.order import Order

SOURCES = ([4, 3], [5], [2, 2, 6])
WEIGHTS = (0.5, 0.3, 0.2)
SHARES = [(3, 1), (1, 1), (7, 2, 1), (1, 1, 1, 1, 1), (40, 1), (13, 11, 7, 5, 3, 2), (97, 1, 1), (99, 98)]


def deviations(shares: tuple[int, ...]) -> dict[int, list[Fraction]]:
    """Of each source, how far its count in the first n positions is from its share of n, over two patterns."""
    pattern, length = even_pattern(shares).tolist() * 2, sum(shares)
    counts = {i: np.cumsum([0] + [source == i for source in pattern]).tolist() for i in range(len(shares))}
    return {i: [count - Fraction(n * shares[i], length) for n, count in enumerate(c)] for i, c in counts.items()}


@pytest.mark.parametrize("shares", SHARES)
def test_a_source_comes_as_often_as_its_weight_says_in_every_stretch(shares: tuple[int, ...]) -> None:
    """Within Tijdeman's 1 - 1 / (2 k - 2) from the start on; so within 1 in any stretch for two sources, else 2."""
    bound = 1 - Fraction(1, 2 * len(shares) - 2)
    for off in deviations(shares).values():
        assert max(map(abs, off)) <= bound
        assert off[sum(shares)] == 0
        assert max(off) - min(off) <= (1 if len(shares) == 2 else 2)


def test_each_source_goes_through_its_samples_once_an_epoch() -> None:
    mixture = Mixture(SOURCES, WEIGHTS, 3, 2)
    drawn: dict[int, list[tuple[int, int]]] = {0: [], 1: [], 2: []}
    for position in range(500):
        source, _ = mixture.source_at(position)
        shard, number = mixture[position]
        first = (0, 2, 3)[source]
        assert 0 <= shard - first < len(SOURCES[source]) and number < SOURCES[source][shard - first]
        drawn[source].append((shard, number))
    assert [len(places) for places in drawn.values()] == [250, 150, 100]
    for source, places in drawn.items():
        size = sum(SOURCES[source])
        epochs = [places[at : at + size] for at in range(0, len(places) - size + 1, size)]
        assert all(len(set(epoch)) == size for epoch in epochs)
        assert len({tuple(epoch) for epoch in epochs}) > len(epochs) // 2


def test_a_position_depends_on_nothing_that_was_asked_before() -> None:
    straight = [Mixture(SOURCES, WEIGHTS, 3, 2)[position] for position in range(300)]
    mixture = Mixture(SOURCES, WEIGHTS, 3, 2)
    assert [mixture[position] for position in reversed(range(300))] == straight[::-1]
    assert [Mixture(SOURCES, WEIGHTS, 4, 2)[position] for position in range(300)] != straight


def test_sources_of_the_same_sizes_do_not_go_in_step() -> None:
    mixture = Mixture([[50], [50]], (1, 1), 0, 1)
    places = [mixture[position] for position in range(100)]
    numbers = [[number for shard, number in places if shard == source] for source in (0, 1)]
    assert sorted(numbers[0]) == sorted(numbers[1]) and numbers[0] != numbers[1]


@pytest.mark.parametrize("weights", [(), (5.0,)])
def test_one_source_has_the_order_of_its_shards(weights: tuple[float, ...]) -> None:
    mixed, plain = order_of([SOURCES[2]], weights, 7, 2), Order(SOURCES[2], 7, 2)
    assert [mixed[n] for n in range(60)] == [plain[n] for n in range(60)]
    assert [mixed.replacement(n, 2) for n in range(60)] == [plain.replacement(n, 2) for n in range(60)]


def test_without_weights_the_sources_are_one() -> None:
    order, plain = order_of(SOURCES, (), 7, 2), Order([4, 3, 5, 2, 2, 6], 7, 2)
    assert [order[n] for n in range(60)] == [plain[n] for n in range(60)]


def test_a_replacement_is_any_sample_of_the_same_source() -> None:
    mixture = Mixture(SOURCES, WEIGHTS, 3, 2)
    drawn = Counter(
        (mixture.source_at(at)[0], mixture.replacement(at, attempt)) for at in range(200) for attempt in (1, 2)
    )
    assert {source: len({place for s, place in drawn if s == source}) for source in range(3)} == {0: 7, 1: 5, 2: 10}
    assert {shard for source, (shard, _) in drawn if source == 2} == {3, 4, 5}


def test_weights_are_read_as_the_decimals_that_they_print_as() -> None:
    assert whole_shares((0.7, 0.2, 0.1), 3) == (7, 2, 1)
    assert whole_shares((3, 1), 2) == whole_shares((1.5, 0.5), 2) == (3, 1)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ((1.0,), r"data\.weights=1 has 1 numbers for 2 folders"),
        ((1.0, 0.0), "must all be above 0"),
        ((1.0, float("nan")), "must all be above 0"),
        ((1.0, 0.1234567), "repeats after 11234567 samples only; round to fewer digits"),
    ],
)
def test_weights_that_cannot_be_kept_are_refused(weights: tuple[float, ...], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        whole_shares(weights, 2)
