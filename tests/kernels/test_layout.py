"""The patterns against what was measured off the paper's figure 11 (6 text slots, a 4 x 4 grid, kernel 3)."""

from collections import Counter

import pytest
import torch

from kernels.layout import Layout, Pattern, Sparsity, layer_pattern

T, W = 6, 4
FIGURE = Layout(T, W, W)
PATTERNS: tuple[Pattern, ...] = ("row", "column", "conv", "dense")
FIGURE_OFFSETS: dict[Pattern, set[int]] = {
    "row": {0, 1, 2, 3, 4},
    "column": {0, 4, 8, 12},
    "conv": {0, 1, 3, 4, 5, 7},
    "dense": set(range(16)),
}


def drawn(offsets: set[int]) -> list[list[bool]]:
    """A 22 x 22 panel, cell by cell, from the distances at which an image slot sees another."""
    panel = [[False] * 22 for _ in range(22)]
    for q in range(22):
        for k in range(22):
            if q < 6:
                panel[q][k] = k <= q
            elif k < 6:
                panel[q][k] = True
            else:
                panel[q][k] = (q - 6) - (k - 6) in offsets
    return panel


@pytest.mark.parametrize("pattern", PATTERNS)
def test_every_cell_is_that_of_the_figure(pattern: Pattern) -> None:
    mask = Sparsity(pattern, FIGURE, kernel=3).mask()
    assert mask.dtype == torch.bool
    assert mask.tolist() == drawn(FIGURE_OFFSETS[pattern])


def test_column_is_block_diagonal_once_image_states_are_transposed() -> None:
    """Panel c: in column-major order each block of W sees itself causally, and no other block."""
    by_column = [T + row * W + column for column in range(W) for row in range(W)]
    mask = Sparsity("column", FIGURE).mask()[by_column][:, by_column]
    assert mask.tolist() == [[q // W == k // W and k <= q for k in range(16)] for q in range(16)]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_text_sees_text_causally_and_image_sees_all_text(pattern: Pattern) -> None:
    layout = Layout(5, 3, 7)
    mask = Sparsity(pattern, layout).mask()
    assert mask[:5, :5].tolist() == [[k <= q for k in range(5)] for q in range(5)]
    assert not mask[:5, 5:].any()
    assert mask[5:, :5].all()


def test_paper_kernel_sees_66_offsets() -> None:
    mask = Sparsity("conv", Layout(0, 32, 32), kernel=11).mask()
    last = mask[-1].nonzero().flatten()
    offsets = {1023 - k for k in last.tolist()}
    assert len(offsets) == 66
    assert offsets == {32 * a + b for a in range(6) for b in (0, 1, 2, 3, 4, 5, 27, 28, 29, 30, 31)}


def test_attended_share_of_the_paper_sequence() -> None:
    layout = Layout(256, 32, 32)
    dense = int(Sparsity("dense", layout).mask().sum())
    assert dense == 1280 * 1281 // 2
    shares = {pattern: int(Sparsity(pattern, layout).mask().sum()) / dense for pattern in PATTERNS[:3]}
    assert {pattern: f"{share:.1%}" for pattern, share in shares.items()} == {
        "row": "40.0%",
        "column": "38.0%",
        "conv": "43.5%",
    }


def test_width_and_not_height_rules_a_grid_that_is_no_square() -> None:
    rows, columns = 3, 5
    layout = Layout(2, rows, columns)
    cells = [(row, column) for row in range(rows) for column in range(columns)]
    assert layout.n_slots == 17
    for n, (row, column) in enumerate(cells):
        seen = {
            pattern: {cells[k] for k in Sparsity(pattern, layout, kernel=3).mask()[2 + n, 2:].nonzero().flatten()}
            for pattern in PATTERNS
        }
        assert seen["column"] == {(above, column) for above in range(row + 1)}
        assert seen["row"] == set(cells[max(0, n - 5) : n + 1])
        assert seen["conv"] == {cells[n - d] for d in (0, 1, 4, 5, 6, 9) if d <= n}
        assert seen["dense"] == set(cells[: n + 1])


def test_mask_refuses_an_even_kernel_and_an_unknown_pattern() -> None:
    with pytest.raises(ValueError, match="10 must be odd"):
        Sparsity("conv", FIGURE, kernel=10).mask()
    with pytest.raises(ValueError, match="'diagonal'"):
        Sparsity("diagonal", FIGURE).mask()  # type: ignore[arg-type]


def test_64_layers_are_47_row_16_column_and_a_last_conv() -> None:
    layers = [layer_pattern(layer, 64) for layer in range(1, 65)]
    assert layers[:4] == ["row", "column", "row", "row"]
    assert layers[-1] == "conv"
    assert Counter(layers) == {"row": 47, "column": 16, "conv": 1}
