"""Pairs of 64-bit hashes that differ in few bits, found by bands instead of by looking at all pairs.

Cut into near + k bands, two hashes that differ in at most `near` bits agree in at least k whole bands (each bit that
differs spoils one). So whoever agrees in k bands is looked at, for every choice of k bands: with k = 1 the textbook
index; a larger k makes more, much smaller, groups. k is chosen by the count of hashes.
"""

import itertools
import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np

T = TypeVar("T")

BITS = 64
CHUNK = 1 << 21  # candidate pairs compared at once: some 50 MB for each worker
SORT_COST = 10.0  # sorting one hash into its group, in units of comparing one pair


class TooManyPairs(Exception):
    """More pairs than the caller has memory for."""


def near_pairs(hashes: np.ndarray, near: int, workers: int, limit: int) -> np.ndarray:
    """All (i, j), i < j, whose hashes differ in at most `near` bits: (P, 2) int64, sorted by j, then i.

    hashes (N,) uint64. Raises TooManyPairs when a choice of bands finds more than `limit` of them.
    """
    found: list[np.ndarray] = []
    count = 0

    def search(mask: int) -> list[np.ndarray]:
        pairs, n_pairs = [], 0
        order, keys = _grouped(hashes, mask)
        side_by_side = hashes[order]
        edges = np.append(np.flatnonzero(keys[1:] != keys[:-1]) + 1, len(keys))
        ends = np.repeat(edges, np.diff(edges, prepend=0))
        starts = np.arange(1, len(keys) + 1)
        for left, right in _joined(starts, ends):
            close = _distance(side_by_side[left], side_by_side[right]) <= near
            ours, theirs = order[left[close]], order[right[close]]
            pairs.append(np.minimum(ours, theirs) << 32 | np.maximum(ours, theirs))
            n_pairs += len(ours)
            if n_pairs > limit:
                raise TooManyPairs
        return pairs

    for pairs in _each(search, band_masks(len(hashes), near), workers):
        found += pairs
        count += sum(map(len, pairs))
        if count > 2 * limit:
            found = [np.unique(np.concatenate(found))]
            count = len(found[0])
            if count > limit:
                raise TooManyPairs
    together = np.unique(np.concatenate(found)) if found else np.empty(0, np.int64)
    if len(together) > limit:
        raise TooManyPairs
    first, second = together >> 32, together & 0xFFFFFFFF
    order = np.lexsort((first, second))
    return np.stack([first[order], second[order]], axis=1)


def first_near(known: np.ndarray, hashes: np.ndarray, near: int, workers: int) -> np.ndarray:
    """For each of hashes (N,) the lowest index into known (M,) of one within `near` bits, else M: (N,) int64."""

    def search(mask: int) -> np.ndarray:
        answer = np.full(len(hashes), len(known), np.int64)
        order, keys = _grouped(known, mask)
        wanted = hashes & np.uint64(mask)
        ranges = (np.searchsorted(keys, wanted, side=side) for side in ("left", "right"))
        for left, right in _joined(*ranges):
            close = _distance(hashes[left], known[order[right]]) <= near
            np.minimum.at(answer, left[close], order[right[close]])
        return answer

    nearest = np.full(len(hashes), len(known), np.int64)
    masks = band_masks(len(known) + len(hashes), near) if len(known) and len(hashes) else []
    for answer in _each(search, masks, workers):
        np.minimum(nearest, answer, out=nearest)
    return nearest


def band_masks(count: int, near: int) -> list[int]:
    """The bits to agree in, one mask for each choice of k bands, k such that `count` even hashes cost least."""

    def cost(k: int) -> float:
        candidates = count * count / 2 / 2 ** (BITS * k / (near + k))
        return math.comb(near + k, k) * (count * SORT_COST + candidates)

    k = min(range(1, 5), key=cost)
    edges = [round(BITS * band / (near + k)) for band in range(near + k + 1)]
    bands = [(1 << end) - (1 << start) for start, end in itertools.pairwise(edges)]
    return [sum(chosen) for chosen in itertools.combinations(bands, k)]


def _each(search: Callable[[int], T], masks: list[int], workers: int) -> Iterator[T]:
    """search(mask) of all masks in their order; numpy lets go of the interpreter's lock, so threads are enough."""
    if workers == 1:
        yield from map(search, masks)
        return
    with ThreadPoolExecutor(workers) as pool:
        for start in range(0, len(masks), workers):  # no more answers wait in memory than there are workers
            yield from pool.map(search, masks[start : start + workers])


def _grouped(hashes: np.ndarray, mask: int) -> tuple[np.ndarray, np.ndarray]:
    """(order that puts equal masked hashes side by side, masked hashes in that order)."""
    keys = hashes & np.uint64(mask)
    order = np.argsort(keys)
    return order, keys[order]


def _joined(starts: np.ndarray, ends: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(i, every number in [starts[i], ends[i])) for all i, in chunks of about CHUNK."""
    counts = ends - starts
    rows = np.flatnonzero(counts > 0)
    counts = counts[rows]
    totals = np.cumsum(counts)
    done = 0
    while done < len(rows):
        before = totals[done - 1] if done else 0
        until = max(done + 1, int(np.searchsorted(totals, before + CHUNK, side="right")))
        sizes = counts[done:until]
        left = np.repeat(rows[done:until], sizes)
        within = np.arange(len(left)) - np.repeat(totals[done:until] - sizes - before, sizes)
        yield left, starts[left] + within
        done = until


def _distance(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    return np.bitwise_count(ours ^ theirs)
