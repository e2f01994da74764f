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

Text sees text causally and never image; image sees all text, pads included. A rule depends on d
alone, so it wraps round the ends of rows. The conv rule is the figure's; `half_window` is the plain
upper half of a kernel x kernel window instead: 0 <= d <= h W + h and (d + h) mod W <= 2 h.
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


@dataclass(frozen=True)
class Sparsity:
    """Which slots a layer's attention may look at.

    kernel: odd side of the conv pattern's window; the paper's is 11. ValueError for an unknown
    pattern or an even kernel.
    """

    pattern: Pattern
    layout: Layout
    kernel: int = 11
    half_window: bool = False

    def __post_init__(self) -> None:
        if self.pattern not in get_args(Pattern):
            raise ValueError(f"pattern {self.pattern!r} is not one of {', '.join(get_args(Pattern))}")
        if self.kernel % 2 == 0:
            raise ValueError(f"conv kernel {self.kernel} must be odd")

    def sees(self, d: Tensor) -> Tensor:
        """Bool of d's shape: may an image slot look at the image slot d slots before it? d is int64."""
        width, h = self.layout.columns, self.kernel // 2
        if self.pattern == "row":
            rule = d <= width
        elif self.pattern == "column":
            rule = d % width == 0
        elif self.pattern == "conv" and self.half_window:
            rule = (d <= h * width + h) & ((d + h) % width <= 2 * h)
        elif self.pattern == "conv":
            rule = (d.div(width, rounding_mode="floor") <= h) & ((d % width <= h) | (d % width >= width - h))
        else:
            rule = torch.ones_like(d, dtype=torch.bool)
        return (d >= 0) & rule

    @property
    def reach(self) -> int:
        """The largest d that an image slot of this layout can see."""
        return int(self.sees(torch.arange(self.layout.n_image)).nonzero().max())

    def mask(self) -> Tensor:
        """(S, S) bool, True where slot q (row) may look at slot k (column)."""
        slot = torch.arange(self.layout.n_slots)
        q, k = slot[:, None], slot[None, :]
        both_image = (q >= self.layout.n_text) & (k >= self.layout.n_text)
        return (q >= k) & (~both_image | self.sees(q - k))


def layer_pattern(layer: int, n_layers: int) -> Pattern:
    """Pattern of layer 1..n_layers: the last is conv, column if (layer - 2) mod 4 = 0, else row (B.1)."""
    if layer == n_layers:
        return "conv"
    return "column" if (layer - 2) % 4 == 0 else "row"
