"""Draws of a batch are those of one generator after the other, bit for bit."""

import pytest

from data_pipeline.draws import Draws
from data_pipeline.order import CROP, DROPOUT, counter_random


@pytest.mark.parametrize("seed", [0, 5, 2**32 - 1, 2**32, 2**40])
@pytest.mark.parametrize("first", [0, 7, 2**32 - 20, 2**32 - 8, 2**32, 2**40])
def test_numbers_are_those_of_counter_random(seed: int, first: int) -> None:
    """Also where seed or position need more than one 32-bit word."""
    positions = range(first, first + 16)
    draws = Draws(seed, DROPOUT, positions)
    for position in (*positions, positions[3], positions[0]):
        one, other = draws.at(position), counter_random(seed, DROPOUT, position)
        assert one.random(3).tolist() == other.random(3).tolist()
        assert one.integers(1000, size=3).tolist() == other.integers(1000, size=3).tolist()


def test_a_generator_begins_anew_though_it_was_left_in_the_middle_of_a_word() -> None:
    """Small integers are drawn from halves of a 64-bit word; the other half must not be left over."""
    draws = Draws(1, CROP, range(4))
    draws.at(0).integers(3)
    assert draws.at(1).integers(3, size=20).tolist() == counter_random(1, CROP, 1).integers(3, size=20).tolist()
