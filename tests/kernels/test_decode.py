"""Drawing one slot at a time equals attention over all slots, from stores that hold no more than is seen."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from kernels.attention import attention
from kernels.decode import PatternCache, Visits
from kernels.layout import Layout, Sparsity, layer_pattern
from tests.kernels.accuracy import LIMIT, relative_error

H, D = 2, 8
LAYOUTS = [Layout(5, 6, 4), Layout(1, 3, 7), Layout(9, 1, 5), Layout(4, 7, 1)]
GROUPS = [(1, 1), (1, 4), (3, 1), (2, 3)]  # captions, candidates of each


def sparsities(layout: Layout) -> list[Sparsity]:
    conv = [Sparsity("conv", layout, kernel, half) for kernel in (1, 3, 11) for half in (False, True)]
    return [Sparsity("row", layout), Sparsity("column", layout), Sparsity("dense", layout), *conv]


def draw(layout: Layout, captions: int, candidates: int, lead: int, dtype: torch.dtype) -> Tensor:
    """(C N, S, 3, H, D) projections; candidates of a caption share its text and its first `lead` image slots."""
    random = torch.Generator().manual_seed(layout.n_slots + captions)
    qkv = torch.randn(captions, candidates, layout.n_slots, 3, H, D, generator=random, dtype=torch.float64)
    qkv[:, :, : layout.n_text + lead] = qkv[:, :1, : layout.n_text + lead]
    return qkv.flatten(0, 1).to(dtype)


def filled(qkv: Tensor, sparsity: Sparsity, captions: int, lead: int) -> PatternCache:
    """A cache that has taken in the text and the first `lead` image slots of each caption."""
    like = qkv[0, 0, 0]
    candidates = len(qkv) // captions
    cache = PatternCache(sparsity, Visits(sparsity, like), captions, candidates, like)
    cache.fill(qkv[::candidates, : sparsity.layout.n_text + lead])
    return cache


def steps(
    cache: PatternCache, qkv: Tensor, sparsity: Sparsity, lead: int, as_tensor: bool = False
) -> Iterator[tuple[int, Tensor]]:
    """(slot, output (C N, H, D)) of the image slots from `lead` on, given as numbers or as a CUDA graph takes them."""
    for slot in range(lead, sparsity.layout.n_image):
        visit = cache.visits.at(torch.tensor([slot]) if as_tensor else slot)
        yield slot, cache.attend(qkv[:, sparsity.layout.n_text + slot], visit)


@pytest.mark.parametrize("as_tensor", [False, True], ids=["numbers", "tensors"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_step_by_step_it_is_attention_whatever_has_been_read_before(
    layout: Layout, dtype: torch.dtype, as_tensor: bool
) -> None:
    for sparsity in sparsities(layout):
        for number, lead in enumerate(sorted({0, 1, layout.columns, layout.columns + 2, layout.n_image - 1})):
            captions, candidates = GROUPS[number % len(GROUPS)]
            lead = min(lead, layout.n_image - 1)
            qkv = draw(layout, captions, candidates, lead, dtype)
            want = attention(qkv.double(), sparsity, "dense")[:, layout.n_text + lead :]
            got = [out for _, out in steps(filled(qkv, sparsity, captions, lead), qkv, sparsity, lead, as_tensor)]
            assert got[0].dtype == dtype
            assert relative_error(torch.stack(got, 1), want) < LIMIT[dtype]


@pytest.mark.parametrize(("captions", "candidates"), GROUPS)
def test_any_grouping_of_captions_and_candidates_gives_the_same(captions: int, candidates: int) -> None:
    layout = LAYOUTS[0]
    for sparsity in sparsities(layout):
        qkv = draw(layout, captions, candidates, 6, torch.float64)
        together = filled(qkv, sparsity, captions, 6)
        alone = [filled(row[None], sparsity, 1, 6) for row in qkv]
        each = zip(*[steps(cache, row[None], sparsity, 6) for cache, row in zip(alone, qkv, strict=True)], strict=True)
        for (slot, out), rows in zip(steps(together, qkv, sparsity, 6), each, strict=True):
            torch.testing.assert_close(out, torch.cat([row for _, row in rows]), rtol=1e-12, atol=1e-13)
            assert all(slot == number for number, _ in rows)


def test_what_a_slot_may_no_longer_see_has_no_say() -> None:
    """Before each step every key and value in the store that the mask hides is made a monster for the time."""
    layout = Layout(3, 6, 4)
    for sparsity in sparsities(layout):
        qkv = draw(layout, 2, 2, 0, torch.float64)
        want = attention(qkv, sparsity, "dense")[:, layout.n_text :]
        cache, seen = filled(qkv, sparsity, 2, 0), sparsity.mask()[layout.n_text :, layout.n_text :]
        for slot in range(layout.n_image):
            kept = cache.image.clone()
            holds = {cache.visits.places[old]: old for old in range(slot)}  # the latest of each place
            hidden = [p for p in range(kept.shape[2]) if p not in holds or not seen[slot, holds[p]]]
            cache.image[:, :, hidden] = 1e6
            out = cache.attend(qkv[:, layout.n_text + slot], cache.visits.at(slot))
            torch.testing.assert_close(out, want[:, slot], rtol=1e-12, atol=1e-13)
            hidden = [p for p in hidden if p != cache.visits.places[slot]]
            cache.image[:, :, hidden] = kept[:, :, hidden]


def test_a_store_that_was_used_serves_again_without_being_cleared() -> None:
    layout = Layout(3, 6, 4)
    for sparsity in sparsities(layout):
        first, second = draw(layout, 2, 2, 5, torch.float64), draw(layout, 1, 4, 5, torch.float64).flip(0)
        second[:, : layout.n_text + 5] = second[::2, : layout.n_text + 5].repeat_interleave(2, 0)
        cache = filled(first, sparsity, 2, 5)
        list(steps(cache, first, sparsity, 5))
        cache.fill(second[::2, : layout.n_text + 5])
        want = attention(second, sparsity, "dense")[:, layout.n_text :]
        for slot, out in steps(cache, second, sparsity, 5):
            torch.testing.assert_close(out, want[:, slot], rtol=1e-12, atol=1e-13)


def test_inputs_are_not_written_to() -> None:
    layout = Layout(2, 3, 4)
    for sparsity in sparsities(layout):
        for captions, candidates in GROUPS:
            qkv = draw(layout, captions, candidates, 2, torch.float32)
            kept = qkv.clone()
            cache = filled(qkv, sparsity, captions, 2)
            biases = cache.visits.bias.clone()
            list(steps(cache, qkv, sparsity, 2))
            assert torch.equal(qkv, kept) and torch.equal(cache.visits.bias, biases)


def test_text_is_stored_once_a_caption_and_image_only_as_far_as_it_is_seen() -> None:
    layout, like = Layout(10, 12, 8), torch.empty(H, D, dtype=torch.bfloat16)
    slots = {  # image slots that a candidate needs
        Sparsity("row", layout): 8 + 1,
        Sparsity("column", layout): 12 * 8,
        Sparsity("conv", layout, 5): 2 * 8 + 7 + 1,  # wrapped round: all of the second row above
        Sparsity("conv", layout, 5, half_window=True): 2 * 8 + 2 + 1,
        Sparsity("dense", layout): 12 * 8,
    }
    for sparsity, image in slots.items():
        for captions, candidates in GROUPS:
            cache = PatternCache(sparsity, Visits(sparsity, like), captions, candidates, like)
            assert cache.n_bytes == 2 * captions * (10 + candidates * image) * H * D * 2


@pytest.mark.parametrize(("candidates", "share"), [(1, 1 / 2), (8, 1 / 3)])
def test_a_model_of_12_layers_needs_a_fraction_of_all_keys(candidates: int, share: float) -> None:
    layout, like = Layout(256, 32, 32), torch.empty(8, 64, device="meta")
    patterns = [Sparsity(layer_pattern(number, 12), layout) for number in range(1, 13)]
    visits = {sparsity: Visits(sparsity, like) for sparsity in patterns}
    ours = sum(PatternCache(sparsity, visits[sparsity], 1, candidates, like).n_bytes for sparsity in patterns)
    full = 12 * candidates * layout.n_slots * 2 * 8 * 64 * 4
    assert ours <= share * full
