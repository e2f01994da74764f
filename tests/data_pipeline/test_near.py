"""Pairs of near hashes: all of them, none else, however the work is cut."""

import itertools

import numpy as np
import pytest

from data_pipeline import near
from data_pipeline.near import BITS, TooManyPairs, band_masks, first_near, near_pairs

NONE = 10**9


def crowd(count: int, flips: int, seed: int) -> np.ndarray:
    """Hashes (count,) around 5 centres, up to `flips` bits from them."""
    random = np.random.default_rng(seed)
    hashes = random.integers(0, 2**64, 5, np.uint64)[random.integers(0, 5, count)]
    for _ in range(flips):
        flipped = np.uint64(1) << random.integers(0, BITS, count).astype(np.uint64)
        hashes = hashes ^ np.where(random.random(count) < 0.7, flipped, np.uint64(0))
    return hashes


def far(ours: int, theirs: int) -> int:
    return (int(ours) ^ int(theirs)).bit_count()


@pytest.mark.parametrize("bits", range(11))
def test_all_near_pairs_are_found_and_no_others(bits: int) -> None:
    hashes = crowd(400, 3, bits)
    pairs = itertools.combinations(range(len(hashes)), 2)
    wanted = sorted(((i, j) for i, j in pairs if far(hashes[i], hashes[j]) <= bits), key=lambda pair: pair[::-1])
    assert len(wanted) > 5
    assert near_pairs(hashes, bits, 1, NONE).tolist() == [list(pair) for pair in wanted]


@pytest.mark.parametrize("bits", [0, 3, 8])
def test_the_first_near_one_is_found(bits: int) -> None:
    known, hashes = crowd(90, 4, 1), crowd(110, 4, 1)[50:]
    wanted = [next((i for i, one in enumerate(known) if far(one, each) <= bits), len(known)) for each in hashes]
    assert bits == 0 or len({*wanted}) > 2
    assert first_near(known, hashes, bits, 1).tolist() == wanted


def test_nothing_is_near_nothing() -> None:
    empty, some = np.empty(0, np.uint64), crowd(3, 1, 0)
    assert near_pairs(empty, 4, 1, NONE).shape == (0, 2)
    assert first_near(empty, some, 4, 1).tolist() == [0, 0, 0]
    assert first_near(some, empty, 4, 2).tolist() == []


@pytest.mark.parametrize(("workers", "chunk"), [(1, 1), (1, 7), (2, 50), (5, near.CHUNK)])
def test_the_answer_depends_on_neither_workers_nor_chunks(
    workers: int, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashes = crowd(200, 3, 2)
    pairs, first = near_pairs(hashes, 4, 1, NONE), first_near(hashes[:100], hashes[100:], 4, 1)
    monkeypatch.setattr(near, "CHUNK", chunk)
    assert np.array_equal(near_pairs(hashes, 4, workers, NONE), pairs)
    assert np.array_equal(first_near(hashes[:100], hashes[100:], 4, workers), first)


def test_more_pairs_than_allowed_are_refused() -> None:
    hashes = crowd(100, 1, 3)
    count = len(near_pairs(hashes, 4, 1, NONE))
    assert len(near_pairs(hashes, 4, 1, count)) == count > 500
    for limit in (count - 1, 10):
        with pytest.raises(TooManyPairs):
            near_pairs(hashes, 4, 2, limit)


@pytest.mark.parametrize("bits", range(11))
@pytest.mark.parametrize("count", [10, 10_000, 10_000_000])
def test_any_bits_that_differ_leave_some_mask_whole(bits: int, count: int) -> None:
    masks = band_masks(count, bits)
    random = np.random.default_rng(bits)
    for _ in range(50):
        flips = sum(1 << int(bit) for bit in random.choice(BITS, bits, replace=False))
        assert any(not flips & mask for mask in masks)


def test_many_hashes_are_put_into_small_groups() -> None:
    """At 4 bits two hashes in a million need only agree in 21 bits, not in 13, to be compared."""
    assert len(band_masks(100, 4)) == 5
    assert len(band_masks(1_000_000, 4)) == 15
    assert min(mask.bit_count() for mask in band_masks(1_000_000, 4)) >= 20
