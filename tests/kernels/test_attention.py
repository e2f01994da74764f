"""The door to attention on a CPU: every pattern against its definition, in value, in gradient and in who sees whom."""

import shutil
from collections.abc import Callable
from functools import partial
from itertools import cycle
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor, library
from torch.utils.checkpoint import checkpoint

from kernels import attention as door
from kernels import attention_cpu
from kernels.layout import Layout, Sparsity
from kernels.reference import masked_attention
from tests.kernels.accuracy import LIMIT, assert_accurate, relative_error

LAYOUTS = {
    "text longer than any look-back": Layout(70, 6, 8),
    "blocks of several rows": Layout(33, 18, 8),
    "no text": Layout(0, 5, 7),
    "one text slot": Layout(1, 9, 4),
    "text shorter than the look-back, prime sides": Layout(3, 11, 13),
    "one row": Layout(9, 1, 17),
    "one column": Layout(9, 17, 1),
    "no text, one column": Layout(0, 17, 1),
    "rows longer than a block": Layout(2, 3, 37),
}
SIZES = ((1, 3), (3, 1), (2, 2))  # (B, H): fewer samples than heads, fewer heads than samples, as many
ONE_EACH = Layout(3, 5, 4)


def sparsities(layout: Layout) -> list[Sparsity]:
    """Every rule over a layout."""
    conv = [Sparsity("conv", layout, kernel, half) for kernel in (1, 3, 5, 11) for half in (False, True)]
    return [Sparsity("row", layout), Sparsity("column", layout), Sparsity("dense", layout), *conv]


def one_of_each(layout: Layout = ONE_EACH) -> list[Sparsity]:
    """Row, column, conv, half window and dense."""
    conv = [Sparsity("conv", layout, 3, half) for half in (False, True)]
    return [Sparsity("row", layout), Sparsity("column", layout), *conv, Sparsity("dense", layout)]


def draw(
    sparsity: Sparsity, b: int = 2, h: int = 2, d: int = 8, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    """qkv and the gradient of the output."""
    random = torch.Generator().manual_seed(sparsity.layout.n_slots + h)
    s = sparsity.layout.n_slots
    qkv, d_out = torch.randn(b, s, 3, h, d, generator=random), torch.randn(b, s, h, d, generator=random)
    return qkv.to(dtype), d_out.to(dtype)


def both_ways(attend: Callable[[Tensor], Tensor], qkv: Tensor, d_out: Tensor) -> dict[str, Tensor]:
    """Output and gradients."""
    qkv = qkv.detach().requires_grad_()
    out = attend(qkv)
    (d_qkv,) = torch.autograd.grad(out, qkv, d_out)
    return dict(zip(("out", "dq", "dk", "dv"), (out.detach(), *d_qkv.unbind(2)), strict=True))


def by_door(qkv: Tensor, d_out: Tensor, sparsity: Sparsity) -> dict[str, Tensor]:
    return both_ways(lambda x: door.attention(x, sparsity, "cpu"), qkv, d_out)


def by_definition(qkv: Tensor, d_out: Tensor, sparsity: Sparsity) -> dict[str, Tensor]:
    def attend(x: Tensor) -> Tensor:
        q, k, v = x.permute(2, 0, 3, 1, 4)
        return masked_attention(q, k, v, sparsity.mask()).transpose(1, 2)

    return both_ways(attend, qkv, d_out)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_every_pattern_equals_its_definition(layout: Layout, dtype: torch.dtype) -> None:
    for sparsity, (b, h) in zip(sparsities(layout), cycle(SIZES), strict=False):
        qkv, d_out = draw(sparsity, b, h, 16, dtype)
        exact = by_definition(qkv.double(), d_out.double(), sparsity)
        values, plain = by_door(qkv, d_out, sparsity), by_definition(qkv, d_out, sparsity)
        if sparsity.kernel == 1 and not layout.n_text:  # each slot sees itself alone: no gradient of a score
            for name in ("dq", "dk"):
                assert values.pop(name).abs().max() <= LIMIT[dtype] * 16
        assert_accurate(values, plain, exact)


@pytest.mark.parametrize("sparsity", one_of_each(), ids=lambda s: f"{s.pattern}{s.half_window}")
def test_gradients_are_those_of_finite_differences(sparsity: Sparsity) -> None:
    qkv, _ = draw(sparsity, 1, 2, 4)
    assert torch.autograd.gradcheck(lambda x: door.attention(x, sparsity, "cpu"), [qkv.requires_grad_()])


@pytest.mark.parametrize("layout", [Layout(3, 5, 4), Layout(0, 4, 5), Layout(9, 8, 7)], ids=str)
def test_each_slot_sees_all_of_the_promised_past_and_nothing_else(layout: Layout) -> None:
    for sparsity in sparsities(layout):
        qkv = draw(sparsity, 1, 1, 4)[0].requires_grad_()
        out = door.attention(qkv, sparsity, "cpu")[0, :, 0]
        rows = [torch.autograd.grad(row.sum(), qkv, retain_graph=True)[0][0, :, :, 0] for row in out]
        dq, dk, dv = torch.stack(rows).ne(0).any(-1).unbind(-1)
        mask = sparsity.mask()
        assert torch.equal(dv, mask)
        assert not (dk & ~mask).any() and not (dq & ~torch.eye(len(mask), dtype=torch.bool)).any()


@pytest.mark.parametrize("sparsity", one_of_each(Layout(5, 9, 6)), ids=lambda s: f"{s.pattern}{s.half_window}")
def test_any_strides_give_the_same(sparsity: Sparsity) -> None:
    qkv, d_out = draw(sparsity)
    want = by_door(qkv, d_out, sparsity)
    wide = torch.full((2, *qkv.shape[1:-1], 9), torch.nan, dtype=qkv.dtype)
    wide[..., 1:] = qkv
    turned = qkv.permute(3, 1, 2, 0, 4).contiguous().permute(3, 1, 2, 0, 4)
    spread = qkv.repeat_interleave(2, -1)[..., ::2]
    d_turned = d_out.transpose(1, 2).contiguous().transpose(1, 2)
    d_spread = d_out.repeat_interleave(2, -1)[..., ::2]
    for views in ((wide[..., 1:], d_out), (turned, d_turned), (spread, d_spread)):
        got = by_door(*views, sparsity)
        assert all(torch.allclose(got[name], want[name], rtol=1e-12, atol=1e-13) for name in want)
    summed = both_ways(lambda x: door.attention(x, sparsity, "cpu").sum().expand(1), qkv, torch.ones(1).double())
    want = by_door(qkv, torch.ones_like(d_out), sparsity)  # a gradient without memory of its own
    assert all(torch.allclose(summed[name], want[name], rtol=1e-12, atol=1e-13) for name in ("dq", "dk", "dv"))


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch, guarded: Callable[[Tensor], Tensor]) -> None:
    """New memory is full of NaN, and guarded: what is left unwritten, or written outside, is seen."""

    def new_empty(like: Tensor, *shape: int, **of: torch.dtype) -> Tensor:
        return guarded(torch.full(shape, torch.nan, dtype=of.get("dtype", like.dtype)))

    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)
    monkeypatch.setattr(torch, "empty_like", lambda like, **_: guarded(torch.full_like(like, torch.nan)))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("layout", [Layout(50, 8, 8), Layout(3, 8, 8), Layout(0, 9, 4)], ids=str)
def test_nothing_outside_is_read_and_all_inside_is_written(layout: Layout, guarded: Callable[[Tensor], Tensor]) -> None:
    for sparsity in one_of_each(layout):
        qkv, d_out = (guarded(tensor) for tensor in draw(sparsity, dtype=torch.float32))
        out, lse = attention_cpu.forward(qkv, sparsity)
        d_qkv = attention_cpu.backward(guarded(d_out), qkv, guarded(out), guarded(lse), sparsity)
        for tensor in (out, lse, d_qkv):
            assert tensor.isfinite().all()


def test_the_log_sum_exp_is_that_of_all_keys() -> None:
    for sparsity in one_of_each():
        qkv, _ = draw(sparsity)
        q, k, _ = qkv.permute(2, 0, 3, 1, 4)
        scores = (q @ k.transpose(-1, -2) / 8**0.5).masked_fill(~sparsity.mask(), -torch.inf)
        torch.testing.assert_close(attention_cpu.forward(qkv, sparsity)[1], scores.logsumexp(-1))


@pytest.mark.parametrize("sparsity", one_of_each(Layout(20, 12, 12)), ids=lambda s: f"{s.pattern}{s.half_window}")
def test_large_scores_neither_overflow_nor_lose_the_sum(sparsity: Sparsity) -> None:
    qkv, d_out = draw(sparsity)
    qkv[:, :, :2] *= 30  # scores of up to some thousand
    want, got = by_definition(qkv, d_out, sparsity), by_door(qkv, d_out, sparsity)
    assert max(relative_error(got[name], want[name]) for name in want) < 1e-10


def test_the_same_bits_come_out_again_and_inputs_stay_as_they_were() -> None:
    for sparsity in one_of_each(Layout(20, 9, 8)):
        qkv, d_out = draw(sparsity, dtype=torch.float32)
        kept = qkv.clone(), d_out.clone()
        one, two = by_door(qkv, d_out, sparsity), by_door(qkv, d_out, sparsity)
        assert all(torch.equal(one[name], two[name]) for name in one)
        assert torch.equal(qkv, kept[0]) and torch.equal(d_out, kept[1])


def test_a_recomputed_layer_gives_the_same_bits() -> None:
    for sparsity in one_of_each():
        qkv, d_out = draw(sparsity, dtype=torch.float32)
        want = by_door(qkv, d_out, sparsity)
        recomputed = partial(checkpoint, door.attention, sparsity=sparsity, how="cpu", use_reentrant=False)
        got = both_ways(recomputed, qkv, d_out)
        assert all(torch.equal(got[name], want[name]) for name in want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_the_operators_keep_what_they_promise_to_torch(dtype: torch.dtype) -> None:
    for sparsity in one_of_each(Layout(3, 3, 4)):
        shape = sparsity.layout
        words = ("cpu", sparsity.pattern, shape.n_text, shape.rows, shape.columns, 3, sparsity.half_window)
        qkv, d_out = draw(sparsity, dtype=dtype)
        out, lse = torch.ops.smalti.attention(qkv, *words)
        tests = ["test_schema", "test_faketensor"]  # the backward operator has no gradient of its own
        library.opcheck(torch.ops.smalti.attention_backward, (d_out, qkv, out, lse, *words), test_utils=tests)
        if dtype == torch.float32:
            tests += ["test_autograd_registration", "test_aot_dispatch_dynamic"]
        library.opcheck(torch.ops.smalti.attention, (qkv.requires_grad_(), *words), test_utils=tests)


@pytest.mark.skipif(not shutil.which("c++"), reason="torch.compile needs a C++ compiler")
def test_a_compiled_caller_is_one_graph_and_agrees() -> None:
    sparsity = Sparsity("conv", ONE_EACH, 3)

    def block(x: Tensor) -> Tensor:
        return door.attention(x * 2, sparsity, "cpu") + 1

    qkv, d_out = draw(sparsity, dtype=torch.float32)
    want = both_ways(block, qkv, d_out)
    got = both_ways(torch.compile(block, fullgraph=True), qkv, d_out)
    assert all(relative_error(got[name], want[name]) < LIMIT[torch.float32] for name in want)


@pytest.mark.parametrize("how", ["auto", "dense", "cpu"])
def test_every_way_gives_the_same(how: door.How) -> None:
    for layout in (Layout(4, 5, 4), Layout(30, 10, 12)):
        for sparsity in one_of_each(layout):
            qkv, d_out = draw(sparsity)
            got = both_ways(partial(door.attention, sparsity=sparsity, how=how), qkv, d_out)
            want = by_definition(qkv, d_out, sparsity)
            assert max(relative_error(got[name], want[name]) for name in want) < LIMIT[torch.float64]


@pytest.mark.parametrize("extra", [-1, 0])
def test_auto_takes_one_product_for_few_slots_and_pieces_for_many(extra: int, monkeypatch: pytest.MonkeyPatch) -> None:
    pieces, product = Mock(wraps=attention_cpu.forward), Mock(wraps=door.masked_attention)
    monkeypatch.setattr(attention_cpu, "forward", pieces)
    monkeypatch.setattr(door, "masked_attention", product)
    sparsity = Sparsity("row", Layout(door.SMALL - 16 + extra, 4, 4))
    door.attention(draw(sparsity)[0], sparsity)
    assert (pieces.call_count, product.call_count) == ((0, 1) if extra < 0 else (1, 0))


def test_what_does_not_fit_is_refused() -> None:
    sparsity = Sparsity("row", ONE_EACH)
    with pytest.raises(ValueError, match="qkv has 22 slots, the layout 23"):
        door.attention(torch.zeros(1, 22, 3, 1, 4), sparsity)
    with pytest.raises(ValueError, match="attention=cpu does not run on meta; attention=auto does"):
        door.attention(torch.zeros(1, 23, 3, 1, 4, device="meta"), sparsity, "cpu")
    assert door.attention(torch.zeros(1, 23, 3, 2, 4, device="meta"), sparsity).shape == (1, 23, 2, 4)
