"""Geometry of the sequence and the attention patterns as boolean masks: the oracle.

Axis letters, the same in every file: B batch, S sequence = T + I, T text slots, I image slots,
G grid side, H heads, D head width, M model width, V text vocabulary, K codebook, C channels,
P picture side, L layers, N candidates, R ranks.

Slots 0..T-1 hold start-of-text, the caption and pads; slots T..T+I-1 hold start-of-image and image
tokens 0..I-2, so slot T+i predicts image token i. The rules were measured off every cell of the
paper's figure 11 (Ramesh et al. 2021, appendix B.1): with q, k image slots and d = q - k,

    row     0 <= d <= W             this slot and the W before it in raster order
    column  d >= 0, d mod W = 0     this column, this row and all above
    conv    d >= 0, d div W <= h, and d mod W <= h or d mod W >= W - h, with h = kernel div 2
    dense   d >= 0

Text sees text causally and never image; image sees all text, pads included.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

Pattern = Literal["row", "column", "conv", "dense"]


@dataclass(frozen=True)
class Layout:
    """T text slots, then rows x columns image slots in raster order."""

    n_text: int
    rows: int
    columns: int

    @property
    def n_image(self) -> int:
        return self.rows * self.columns

    @property
    def n_slots(self) -> int:
        return self.n_text + self.n_image


def attention_mask(pattern: Pattern, layout: Layout, kernel: int = 11) -> Tensor:
    """(S, S) bool, True where slot q (row) may look at slot k (column).

    kernel: odd side of the conv pattern's window; the paper's is 11. ValueError for another pattern
    or an even kernel.
    """
    if pattern not in get_args(Pattern):
        raise ValueError(f"pattern {pattern!r} is not one of {', '.join(get_args(Pattern))}")
    if kernel % 2 == 0:
        raise ValueError(f"conv kernel {kernel} must be odd")
    slot = torch.arange(layout.n_slots)
    q, k = slot[:, None], slot[None, :]
    both_image = (q >= layout.n_text) & (k >= layout.n_text)
    return (q >= k) & (~both_image | _image_rule(pattern, q - k, layout.columns, kernel // 2))


def _image_rule(pattern: Pattern, d: Tensor, width: int, half: int) -> Tensor:
    if pattern == "row":
        return d <= width
    if pattern == "column":
        return d % width == 0
    if pattern == "conv":
        return (d.div(width, rounding_mode="floor") <= half) & ((d % width <= half) | (d % width >= width - half))
    return torch.ones_like(d, dtype=torch.bool)


def layer_pattern(layer: int, n_layers: int) -> Pattern:
    """Pattern of layer 1..n_layers: the last is conv, column if (layer - 2) mod 4 = 0, else row (B.1)."""
    if layer == n_layers:
        return "conv"
    return "column" if (layer - 2) % 4 == 0 else "row"
