"""Triton's attention, run in its interpreter, against the definition in float64 and against the door's other ways."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, library
from torch.utils.checkpoint import checkpoint

from kernels import attention as door
from kernels.layout import Layout, Sparsity
from kernels.reference import masked_attention
from tests.kernels.accuracy import assert_accurate, relative_error

pytest.importorskip("triton", reason="Triton is not installed here")
from kernels import attention_triton

pytestmark = [
    pytest.mark.interpreter,
    # numpy, unlike a GPU, speaks of what is computed but never kept: 0 / 0 in rows past the end of a cut tile,
    # and weights of keys that a slot does not see.
    pytest.mark.filterwarnings("ignore:(invalid value|divide by zero|overflow):RuntimeWarning"),
]

HALF = "half window"
# Sparsity, (B, H, D). Tiles are 64 or 32 slots and steps 32 or 16.
CASES = {
    "row, no size cuts a tile": (Sparsity("row", Layout(64, 8, 16)), (1, 1, 64)),
    "row longer than two tiles": (Sparsity("row", Layout(5, 2, 90)), (1, 1, 32)),
    "row, one text slot, prime sides": (Sparsity("row", Layout(1, 17, 7)), (2, 1, 16)),
    "column, three heads of an odd width": (Sparsity("column", Layout(33, 9, 11)), (1, 3, 24)),
    "column longer than a tile": (Sparsity("column", Layout(3, 100, 2)), (1, 1, 48)),
    "column of one row": (Sparsity("column", Layout(7, 1, 40)), (1, 1, 16)),
    "conv over many tiles": (Sparsity("conv", Layout(20, 16, 16)), (1, 1, 32)),
    "conv, small window, prime sides": (Sparsity("conv", Layout(70, 11, 13), 5), (1, 1, 80)),
    "conv wider than the picture": (Sparsity("conv", Layout(9, 6, 4)), (1, 2, 16)),
    "half window": (Sparsity("conv", Layout(64, 8, 16), 7, half_window=True), (1, 1, 32)),
    "half window without text": (Sparsity("conv", Layout(0, 13, 6), 5, half_window=True), (1, 1, 20)),
    "dense": (Sparsity("dense", Layout(30, 7, 7)), (1, 2, 32)),
    "row without text": (Sparsity("row", Layout(0, 10, 9)), (1, 1, 16)),
}
PATTERNS = {
    "row": Sparsity("row", Layout(37, 9, 11)),
    "column": Sparsity("column", Layout(37, 9, 11)),
    "conv": Sparsity("conv", Layout(37, 9, 11), 5),
    HALF: Sparsity("conv", Layout(37, 9, 11), 5, half_window=True),
    "dense": Sparsity("dense", Layout(37, 9, 11)),
}


def draw(sparsity: Sparsity, b: int, h: int, d: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """qkv and the gradient of the output."""
    random = torch.Generator().manual_seed(sparsity.layout.n_slots + d)
    s = sparsity.layout.n_slots
    qkv, d_out = torch.randn(b, s, 3, h, d, generator=random), torch.randn(b, s, h, d, generator=random)
    return qkv.to(dtype), d_out.to(dtype)


def by_triton(qkv: Tensor, d_out: Tensor, sparsity: Sparsity) -> dict[str, Tensor]:
    layout = sparsity.layout
    rule = (sparsity.pattern, layout.n_text, layout.rows, layout.columns, sparsity.kernel, sparsity.half_window)
    out, lse = door._forward(qkv, "triton", *rule)
    d_qkv = door._backward(d_out, qkv, out, lse, "triton", *rule)
    return dict(zip(("out", "dq", "dk", "dv"), (out, *d_qkv.unbind(2)), strict=True))


def by_definition(qkv: Tensor, d_out: Tensor, sparsity: Sparsity) -> dict[str, Tensor]:
    qkv = qkv.detach().clone().requires_grad_()
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    out = masked_attention(q, k, v, sparsity.mask()).transpose(1, 2)
    out.backward(d_out)
    assert qkv.grad is not None
    return dict(zip(("out", "dq", "dk", "dv"), (out.detach(), *qkv.grad.unbind(2)), strict=True))


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch, guarded: Callable[[Tensor], Tensor]) -> None:
    """New memory is full of NaN, and guarded: what a kernel leaves unwritten is seen."""
    monkeypatch.setattr(torch, "empty", lambda *shape, **of: guarded(torch.full(shape, torch.nan, **of)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_output_and_gradients_are_those_of_the_definition(
    case: str, dtype: torch.dtype, guarded: Callable[[Tensor], Tensor], poisoned: None
) -> None:
    sparsity, sizes = CASES[case]
    qkv, d_out = draw(sparsity, *sizes, dtype)
    exact = by_definition(qkv.double(), d_out.double(), sparsity)
    plain = by_definition(qkv, d_out, sparsity)
    assert_accurate(by_triton(guarded(qkv), guarded(d_out), sparsity), plain, exact)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_slot_sees_all_that_the_mask_promises_and_nothing_else(pattern: str) -> None:
    """One-hot vectors show the S x S matrices themselves: head h has a 1 at feature f for slot h D + f."""
    sparsity = PATTERNS[pattern]
    mask, d = sparsity.mask(), 64
    s, n_heads = mask.shape[0], -(-mask.shape[0] // d)
    one_hot = torch.eye(n_heads * d)[:s].view(1, s, n_heads, d)
    random = torch.randn(1, s, 2, 1, d, generator=torch.Generator().manual_seed(0)).expand(-1, -1, -1, n_heads, -1)

    def shown(first: Tensor, second: Tensor, v: Tensor, d_out: Tensor) -> dict[str, Tensor]:
        results = by_triton(torch.stack([first, second, v], 2), d_out, sparsity)
        return {name: rows.reshape(s, n_heads * d)[:, :s] != 0 for name, rows in results.items()}

    weights = shown(*random.unbind(2), one_hot, one_hot)  # out = weights v, dv = weights^T d_out
    assert torch.equal(weights["out"], mask)
    assert torch.equal(weights["dv"], mask.T)
    d_scores = shown(one_hot, one_hot, *random.unbind(2))  # dq = d_scores k, dk = d_scores^T q
    alone = mask & (mask.sum(1, keepdim=True) == 1)  # whose one weight stays 1: no gradient, or a rounding
    assert torch.equal(d_scores["dq"] | alone, mask)
    assert torch.equal(d_scores["dk"] | alone.T, mask.T)


def test_any_strides_will_do_and_give_the_same_bits() -> None:
    sparsity = Sparsity("column", Layout(5, 6, 5))
    qkv, d_out = draw(sparsity, 2, 3, 24)
    packed = by_triton(qkv, d_out, sparsity)
    for order in ((2, 0, 3, 1, 4), (1, 3, 0, 2, 4), (0, 2, 4, 3, 1)):  # the last has features apart
        back = torch.tensor(order).argsort().tolist()
        strided, d_strided = qkv.permute(order).contiguous().permute(back), d_out.mT.contiguous().mT
        assert strided.stride() != qkv.stride() and d_strided.stride() != d_out.stride()
        results = by_triton(strided, d_strided, sparsity)
        assert all(torch.equal(results[name], packed[name]) for name in packed)
        assert all(value.is_contiguous() for name, value in results.items() if name == "out")
    ones = torch.ones(()).expand_as(d_out)  # what .sum() sends back: all strides 0
    expected = by_triton(qkv, ones.contiguous(), sparsity)
    assert all(torch.equal(value, expected[name]) for name, value in by_triton(qkv, ones, sparsity).items())


@pytest.mark.parametrize("pattern", ["column", "conv"])
def test_wide_offsets_change_no_bit(pattern: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sparsity = PATTERNS[pattern]
    qkv, d_out = draw(sparsity, 1, 2, 16)
    narrow = by_triton(qkv, d_out, sparsity)
    assert not attention_triton._is_wide(qkv)
    assert attention_triton._is_wide(
        torch.empty(1, 9, 3, 1, 1, device="meta").as_strided((1, 9, 3, 1, 1), (0, 2**28, 1, 1, 1))
    )
    monkeypatch.setattr(attention_triton, "_is_wide", lambda *tensors: True)
    assert all(torch.equal(value, narrow[name]) for name, value in by_triton(qkv, d_out, sparsity).items())


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_second_run_gives_the_same_bits(pattern: str) -> None:
    qkv, d_out = draw(PATTERNS[pattern], 1, 2, 16, torch.float16)
    first, second = (by_triton(qkv, d_out, PATTERNS[pattern]) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("all_below", [False, True])
def test_scores_far_from_zero_neither_overflow_nor_vanish(all_below: bool) -> None:
    """Scores of up to 1,500, whose exp is infinite; or all near -900, where a key past the end would weigh 2^1300."""
    sparsity = PATTERNS["conv"]
    qkv, d_out = draw(sparsity, 1, 1, 32)
    qkv[:, :, :2] *= 16
    if all_below:
        qkv[:, :, 0], qkv[:, :, 1] = -qkv[:, :, 0].abs(), qkv[:, :, 1].abs()
    results, exact = by_triton(qkv, d_out, sparsity), by_definition(qkv.double(), d_out.double(), sparsity)
    for name, value in results.items():
        # A score of 1,500 is off by 1,500 x 2^-24 = 9e-5 after each of a few roundings, its weight relatively so.
        assert relative_error(value, exact[name]) < 5e-4


@pytest.mark.parametrize("checkpointed", [False, True])
def test_through_the_door_with_autograd_and_checkpoint(checkpointed: bool) -> None:
    sparsity = PATTERNS["row"]
    qkv, d_out = draw(sparsity, 1, 2, 16)
    weight = torch.ones(16, requires_grad=True)

    def layer(qkv: Tensor) -> Tensor:
        return door.attention(qkv * weight, sparsity, "triton")

    qkv.requires_grad_()
    out = checkpoint(layer, qkv, use_reentrant=False) if checkpointed else layer(qkv)
    out.backward(d_out)
    exact = by_definition(qkv.double(), d_out.double(), sparsity)
    plain = by_definition(qkv, d_out, sparsity)
    assert qkv.grad is not None and weight.grad is not None
    results = dict(zip(("out", "dq", "dk", "dv"), (out.detach(), *qkv.grad.unbind(2)), strict=True))
    assert_accurate(results, plain, exact)
    torch.testing.assert_close(weight.grad, (qkv * qkv.grad).sum((0, 1, 2, 3)).detach(), rtol=1e-4, atol=1e-4)


def test_the_operators_keep_the_rules_of_torch_library() -> None:
    sparsity = Sparsity("column", Layout(3, 4, 5))
    qkv, d_out = draw(sparsity, 1, 2, 16)
    words = ("triton", "column", 3, 4, 5, 11, False)
    library.opcheck(door._forward, (qkv.requires_grad_(), *words))
    out, lse = attention_triton.forward(qkv.detach(), sparsity)
    library.opcheck(door._backward, (d_out, qkv.detach(), out, lse, *words))


def test_other_dtypes_and_wider_heads_are_refused() -> None:
    sparsity = Sparsity("row", Layout(2, 2, 2))
    with pytest.raises(ValueError, match="not torch.float64; attention=dense"):
        door.attention(torch.zeros(1, 6, 3, 1, 16, dtype=torch.float64), sparsity, "triton")
    with pytest.raises(ValueError, match="128 at most, not 136"):
        door.attention(torch.zeros(1, 6, 3, 1, 136), sparsity, "triton")
