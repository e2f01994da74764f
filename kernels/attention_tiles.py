"""Sequence geometry inside a Triton kernel: where a tile lies, what it must meet, and the rule on its cells.

A tile holds BLOCK or STEP neighbours of one segment, text or image, counted from the segment's start. The
compile-time letters: T text slots, ROWS x COLUMNS image slots, RULE the pattern's name ("half window" for
that variant of conv), HALF = kernel div 2, REACH = Sparsity.reach, D features in a row of FEATURES (the
power of two that holds them). Dense attention is passed as one long text.
"""

from typing import Any

import triton
import triton.language as tl
from triton.language import constexpr, tensor


@triton.jit
def place(n: tensor, n_z: tensor, T: constexpr, N_IMAGE: constexpr, BLOCK: constexpr) -> Any:
    """The n-th tile: its batch and head z, whether it is text, its first index there, the length of that segment.

    All text tiles come before all image tiles, and the tiles of one head are neighbours, for the L2 cache.
    """
    TEXT: constexpr = (T + BLOCK - 1) // BLOCK
    IMAGE: constexpr = (N_IMAGE + BLOCK - 1) // BLOCK
    is_text = n < n_z * TEXT
    n = tl.where(is_text, n, n - n_z * TEXT)
    tiles = tl.where(is_text, TEXT, IMAGE)
    return n // tiles, is_text, n % tiles * BLOCK, tl.where(is_text, T, N_IMAGE)


@triton.jit
def slot(i: tensor, is_text: tensor, T: constexpr, ROWS: constexpr, COLUMNS: constexpr, RULE: constexpr) -> Any:
    """Slot of the i-th of a segment. Only column walks the image otherwise than in raster order."""
    if RULE == "column":
        return tl.where(is_text, i, T + i % ROWS * COLUMNS + i // ROWS)
    else:
        return i + tl.where(is_text, 0, T)


@triton.jit
def sees(
    q: tensor, k: tensor, is_text: tensor,
    T: constexpr, ROWS: constexpr, COLUMNS: constexpr, RULE: constexpr, HALF: constexpr,
) -> Any:  # fmt: skip
    """May the q-th of a segment look at the k-th? This is Sparsity.sees; q < segment length implies k < it."""
    d = slot(q, is_text, T, ROWS, COLUMNS, RULE) - slot(k, is_text, T, ROWS, COLUMNS, RULE)
    if RULE == "row":
        return (q >= k) & (is_text | (d <= COLUMNS))
    elif RULE == "column":
        return (q >= k) & (is_text | (d % COLUMNS == 0))
    elif RULE == "half window":
        return (q >= k) & (is_text | ((d <= HALF * COLUMNS + HALF) & ((d + HALF) % COLUMNS <= 2 * HALF)))
    elif RULE == "conv":
        near = (d % COLUMNS <= HALF) | (d % COLUMNS >= COLUMNS - HALF)
        return (q >= k) & (is_text | ((d // COLUMNS <= HALF) & near))
    else:
        return q >= k


@triton.jit
def first_key(i: tensor, is_text: tensor, ROWS: constexpr, REACH: constexpr, RULE: constexpr, STEP: constexpr) -> Any:
    """Where the band of the queries from i on starts: a multiple of STEP."""
    if RULE == "dense":
        return i
    elif RULE == "column":
        return tl.where(is_text, i, i // ROWS * ROWS // STEP * STEP)
    else:
        return tl.where(is_text, i, tl.maximum(i - REACH, 0) // STEP * STEP)


@triton.jit
def last_query(
    end: tensor, is_text: tensor, N_IMAGE: constexpr, ROWS: constexpr, REACH: constexpr, RULE: constexpr
) -> Any:
    """One past the last query that the band of the keys before `end` holds."""
    if RULE == "dense":
        return end
    elif RULE == "column":
        return tl.where(is_text, end, tl.minimum((end + ROWS - 1) // ROWS * ROWS, N_IMAGE))
    else:
        return tl.where(is_text, end, tl.minimum(end + REACH, N_IMAGE))


@triton.jit
def elements(
    slots: tensor, stride: tensor, i: tensor, end: tensor,
    D: constexpr, FEATURES: constexpr, CUT: constexpr, WIDE: constexpr,
) -> Any:  # fmt: skip
    """Offsets of (slots, features), and which of them exist: i < end (asked if CUT) and feature < D."""
    feature = tl.arange(0, FEATURES)
    if WIDE:
        slots = slots.to(tl.int64)
    exist = tl.full([slots.shape[0], FEATURES], True, tl.int1)
    if FEATURES > D:
        exist = exist & (feature < D)[None, :]
    if CUT:
        exist = exist & (i < end)[:, None]
    return slots[:, None] * stride + feature[None, :], exist
