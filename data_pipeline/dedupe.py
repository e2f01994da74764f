"""Copies of pictures: equal pixels, or looks that differ in a few bits of a perceptual hash.

The hash is the signs of a picture's lowest frequencies (pHash: Zauner 2010, "Implementation and benchmarking of
perceptual image hash functions", 3.2.1). It is made in whole numbers, so every machine gives the same bits; a library
would do so in floating point, and the usual one brings SciPy and PyWavelets for it.
"""

import hashlib
import itertools
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image

from cluster.settings import SettingError, setting
from data_pipeline.near import BITS, TooManyPairs, first_near, near_pairs

NO_HASH = 0  # of a picture too flat to have one
SIDE, FREQUENCIES = 32, 10  # of the picture that is looked at; enough of them to hold the 64 lowest
CLEAR = 20  # one part in so many of the average
FLAT = 3.0  # standard deviation of grey levels, of 255: below it the signs are those of the noise
MOST_NEAR = 10  # beyond, unrelated pictures are taken for copies, and the search takes minutes for a million
PAIRS_AT_ONCE = 500_000  # held in memory, some 100 bytes each


@dataclass(frozen=True)
class DedupeConfig:
    """Which copies are dropped: all but the first, and those of a held-out set."""

    exact: bool = setting(False, "drop pictures whose pixels equal an earlier one's")
    near: int = setting(-1, "drop pictures that look like an earlier one: at most so many of 64 bits differ; -1 is off")
    against: str = setting("", "folder of images/ shards whose pictures, and copies of them, must not be in this set")

    def __post_init__(self) -> None:
        if not -1 <= self.near <= MOST_NEAR:
            raise SettingError(f"dedupe.near={self.near} must be from 0 to {MOST_NEAR} bits, or -1 for off")
        if self.against and not self.exact and self.near < 0:
            raise SettingError("dedupe.against needs a rule for copies: dedupe.exact=true or dedupe.near=4")


def marks(image: Image.Image) -> tuple[bytes, int]:
    """(sha256 over size and pixels, 32 bytes; 64-bit perceptual hash, NO_HASH for a flat picture). `image` is RGB."""
    digest = hashlib.sha256(b"%d %d " % image.size + image.tobytes()).digest()
    return digest, looks(image)


def looks(image: Image.Image) -> int:
    """64 bits that scaling and compression leave nearly as they are: which low frequencies are clearly positive.

    NO_HASH for a picture of hardly any contrast. pHash asks which are above their median; in a symmetric picture half
    of the frequencies and so the median too are nothing but noise, and a JPEG of it differs in up to 20 bits. So a
    frequency must be above a twentieth of what they all are on average (root of the mean square).
    """
    grey = np.asarray(image.convert("L").resize((SIDE, SIDE), Image.Resampling.LANCZOS, reducing_gap=3.0), np.int64)
    if grey.std() < FLAT:
        return NO_HASH
    cosines = _cosines()
    values = (cosines @ grey @ cosines.T >> 12)[_lowest()]  # up to 2^22, so that what follows fits in 64 bits
    clear = (values > 0) & (CLEAR**2 * BITS * values**2 > (values**2).sum())
    return int(np.packbits(clear).view(">u8")[0])


@cache
def _cosines() -> np.ndarray:
    """Rows of the discrete cosine transform in 256ths: (frequencies, SIDE) int64."""
    frequency, place = np.arange(FREQUENCIES)[:, None], np.arange(SIDE)[None]
    return np.rint(256 * np.cos(np.pi * (2 * place + 1) * frequency / (2 * SIDE))).astype(np.int64)


@cache
def _lowest() -> tuple[np.ndarray, np.ndarray]:
    """(rows, columns) of the 64 lowest frequencies, by distance from the constant, which is left out."""
    places = itertools.product(range(FREQUENCIES), range(FREQUENCIES))
    nearest = sorted(places, key=lambda at: (at[0] ** 2 + at[1] ** 2, max(at), at))[1 : BITS + 1]
    rows, columns = np.array(nearest).T
    return rows, columns


def copies(digests: np.ndarray, hashes: np.ndarray, near: int, workers: int, fixed: int = 0) -> np.ndarray:
    """For each of N samples the earliest kept sample that it is a copy of, else -1: (N,) int64.

    digests (N, 32) uint8 and hashes (N,) uint64 come from `marks`. Copies have equal digests or, where `near` is not
    -1, hashes that differ in at most `near` bits; flat pictures, which have no hash, are compared by digest only. A
    sample that is itself a copy makes nobody a copy, so whoever comes first stays. The first `fixed` samples (those of
    a set that must not overlap this one) are kept whatever they resemble. The answer does not depend on `workers`.
    """
    kinds, first = _kinds(digests, hashes, near)
    leaders = _leaders(hashes[first], int((first < fixed).sum()), near, workers)
    answer = first[leaders][kinds]
    own = np.arange(len(digests))
    answer[(answer == own) | (own < fixed)] = -1
    return answer


def _kinds(digests: np.ndarray, hashes: np.ndarray, near: int) -> tuple[np.ndarray, np.ndarray]:
    """(kind of each sample, first sample of each kind), kinds in the order of their first samples.

    Samples of one kind are copies of each other and of the same others: of one hash or, without one, of one digest.
    So a million equal pictures are one.
    """
    by_digest = np.ascontiguousarray(digests).view("S32").ravel()
    _, first, kinds = np.unique(by_digest, return_index=True, return_inverse=True)
    if near >= 0:
        marked = hashes != NO_HASH
        _, first_marked, kinds_marked = np.unique(hashes[marked], return_index=True, return_inverse=True)
        kinds[marked] = len(first) + kinds_marked
    _, first, kinds = np.unique(kinds, return_index=True, return_inverse=True)
    order = np.argsort(first)
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    return rank[kinds], first[order]


def _leaders(hashes: np.ndarray, fixed: int, near: int, workers: int) -> np.ndarray:
    """For each of U kinds in their order the earliest kept kind within `near` bits: (U,) int64; its own if none is.

    The first `fixed` kinds are kept though they may have a leader. All at once while the pairs fit in memory. Else
    the earlier half first: its copies are then out of the way, and what is kept of it takes those of the later half
    away without a list of pairs.
    """
    own = np.arange(len(hashes))
    if near < 1:  # kinds are not equal
        return own
    leaders = own.copy()
    unled = hashes != NO_HASH
    kept = unled.copy()  # as far as is known: those before `start` for certain
    spans = [(0, 0, len(hashes))]  # to do next: the last
    while spans:
        seen, start, end = spans.pop()  # compared with all kept before `seen`, settled before `start`
        known, new = np.flatnonzero(kept[seen:start]) + seen, np.flatnonzero(unled[start:end]) + start
        nearest = first_near(hashes[known], hashes[new], near, workers)
        led = nearest < len(known)
        leaders[new[led]] = known[nearest[led]]
        _mark_led(new[led], fixed, unled, kept)
        rest = np.flatnonzero(kept[start:end]) + start
        try:
            pairs = rest[near_pairs(hashes[rest], near, workers, PAIRS_AT_ONCE)]
        except TooManyPairs:
            middle = (start + end) // 2
            spans += [(start, middle, end), (start, start, middle)]
            continue
        later, earlier = _greedy(pairs, leaders != own, fixed)
        leaders[later] = earlier
        _mark_led(later, fixed, unled, kept)
    return leaders


def _mark_led(kinds: np.ndarray, fixed: int, unled: np.ndarray, kept: np.ndarray) -> None:
    unled[kinds] = False
    kept[kinds[kinds >= fixed]] = False


def _greedy(pairs: np.ndarray, has_leader: np.ndarray, fixed: int) -> np.ndarray:
    """(kinds, the leader of each) from pairs (P, 2) of near kinds in order of the later one, then of the earlier."""
    led: dict[int, int] = {}
    for earlier, later in zip(pairs[:, 0].tolist(), pairs[:, 1].tolist(), strict=True):
        if later not in led and not has_leader[later] and (earlier < fixed or earlier not in led):
            led[later] = earlier
    return np.array([list(led), list(led.values())], np.int64)
