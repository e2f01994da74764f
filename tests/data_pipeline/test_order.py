"""The order of samples: a pure function, each once an epoch, the same for any number of ranks."""

import numpy as np
import pytest

from data_pipeline.order import Order, counter_random

SIZES = (5, 1, 8, 3, 4, 7)
GOLDEN_EPOCH = [(2, 1), (2, 0), (2, 3), (2, 2), (1, 1), (1, 0), (0, 2), (0, 1), (0, 0)]
GOLDEN_SOURCE = [(2, 2), (1, 1), (2, 1), (2, 0), (2, 3), (1, 0), (0, 2), (0, 1), (0, 0)]
GOLDEN_REPLACEMENTS = [(2, 1), (1, 1), (0, 1)]


def take(order: Order, first: int, last: int) -> list[tuple[int, int]]:
    return [order[position] for position in range(first, last)]


@pytest.mark.parametrize("window", [1, 2, 4, 6, 100])
@pytest.mark.parametrize("seed", [0, 7])
def test_each_sample_comes_once_an_epoch(seed: int, window: int) -> None:
    order = Order(SIZES, seed, window)
    everything = {(shard, sample) for shard, size in enumerate(SIZES) for sample in range(size)}
    epochs = [take(order, 28 * epoch, 28 * (epoch + 1)) for epoch in range(4)]
    for epoch in epochs:
        assert len(epoch) == 28 and set(epoch) == everything
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_the_order_depends_on_seed_and_position_alone() -> None:
    straight = take(Order(SIZES, 3, 2), 0, 200)
    asked_backwards = Order(SIZES, 3, 2)
    assert [asked_backwards[position] for position in reversed(range(200))] == straight[::-1]
    assert take(Order(SIZES, 4, 2), 0, 200) != straight


def test_the_order_of_a_release_is_that_of_the_next() -> None:
    """A resume under a newer numpy or smalti must go on in the same order."""
    first = [(0, 0), (0, 2), (1, 1), (0, 1), (1, 0), (2, 1), (2, 2), (2, 0), (2, 3)]
    assert take(Order((3, 2, 4), 1, 2), 0, 9) == first


def test_the_order_of_a_release_is_that_of_the_next_in_later_epochs_and_other_sources() -> None:
    assert take(Order((3, 2, 4), 1, 2), 9, 18) == GOLDEN_EPOCH
    assert take(Order((3, 2, 4), 1, 2, source=0), 9, 18) == GOLDEN_EPOCH
    assert take(Order((3, 2, 4), 1, 2, source=1), 9, 18) == GOLDEN_SOURCE
    assert [Order((3, 2, 4), 1, 2).replacement(5, attempt) for attempt in (1, 2, 3)] == GOLDEN_REPLACEMENTS


def test_replacements_are_any_samples_and_depend_on_seed_position_attempt_and_source() -> None:
    order = Order(SIZES, 3, 2)
    drawn = [order.replacement(position, attempt) for position in range(300) for attempt in (1, 2)]
    assert set(drawn) == {(shard, sample) for shard, size in enumerate(SIZES) for sample in range(size)}
    again = Order(SIZES, 3, 2)
    assert [again.replacement(p, a) for p in reversed(range(300)) for a in (2, 1)] == drawn[::-1]
    for other in (Order(SIZES, 4, 2), Order(SIZES, 3, 2, source=1)):
        assert [other.replacement(position, 1) for position in range(300)] != drawn[::2]
    assert drawn[::2] != drawn[1::2]


def test_samples_mix_within_a_window_of_shards_and_not_beyond() -> None:
    shards = [shard for shard, _ in take(Order((50,) * 12, 0, 3), 0, 600)]
    for first in range(0, 600, 150):
        window = shards[first : first + 150]
        assert len(set(window)) == 3
        assert len(set(window[:20])) == 3
    assert sorted(set(shards)) == list(range(12))
    assert shards[::150] != sorted(shards[::150])


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8])
def test_ranks_together_take_the_one_global_order(ranks: int) -> None:
    """Step s takes positions [24 s, 24 s + 24), whoever takes them."""
    orders = [Order(SIZES, 0, 2) for _ in range(ranks)]
    local = 24 // ranks
    together = [
        orders[rank][24 * step + rank * local + n] for step in range(7) for rank in range(ranks) for n in range(local)
    ]
    assert together == take(Order(SIZES, 0, 2), 0, 168)


def test_draws_of_two_purposes_or_positions_differ_and_one_draw_stays() -> None:
    counters = [(seed, purpose, at) for seed in (0, 1) for purpose in (0, 1, 5) for at in (0, 1, 2, 2**31, 2**40)]
    draws = [float(counter_random(*counter).random()) for counter in counters]
    assert len(set(draws)) == len(draws)
    np.random.seed(5)
    assert [float(counter_random(*counter).random()) for counter in counters] == draws
