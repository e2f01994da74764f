"""Drawing: noise from counters, filters, draws that follow the softmax, and nothing beside a candidate matters."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from data_pipeline.loader import PAD
from pretrain import draw
from pretrain.config import TransformerConfig
from pretrain.decoder import Decoder
from pretrain.draw import UNKNOWN, Taste, draw_rows, gumbel_noise, kept_from, noise_keys, pick
from pretrain.model import Sizes, Transformer

CONFIG = TransformerConfig(n_text=5, n_layers=3, n_heads=2, d_head=8, conv_kernel=3)
GRID, N_IMAGE, CODES = 3, 9, 10
PLAIN = Taste()
TASTES = [PLAIN, Taste(0.8, top_k=5, top_p=0.9), Taste(cfg_scale=2.0), Taste(1.3, top_p=0.7, cfg_scale=0.5)]
WORD = 2**64 - 1  # all bits


def model() -> Transformer:
    torch.manual_seed(0)
    made = Transformer(CONFIG, Sizes(16, CODES, GRID))
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return made.eval()


def texts(captions: int) -> Tensor:
    text = torch.randint(16, (captions, 4), generator=torch.Generator().manual_seed(3))
    text[::2, 2:] = PAD
    return text


def keys_of(captions: int, candidates: int) -> Tensor:
    return torch.stack([noise_keys(f"{c}", 0, n, N_IMAGE) for c in range(captions) for n in range(candidates)])


def drawn(
    net: Transformer, captions: int, candidates: int, taste: Taste = PLAIN, known: Tensor | None = None
) -> Tensor:
    """(C N, I) codes."""
    *_, last = draw_rows(net, texts(captions), keys_of(captions, candidates), taste, known)
    return last


@torch.no_grad()
def replayed(net: Transformer, codes: Tensor, captions: int, candidates: int, taste: Taste) -> Tensor:
    """The code that each slot draws from the full pass over the codes before it."""
    text = texts(captions).repeat_interleave(candidates, 0)
    caption, empty = net(text, codes)[1], net(torch.full_like(text, PAD), codes)[1]
    logits, keys = empty + taste.cfg_scale * (caption - empty), keys_of(captions, candidates)
    return torch.stack([pick(logits[:, slot], keys[:, slot], taste)[0] for slot in range(N_IMAGE)], 1)


# noise


def scrambled(key: int, count: int) -> list[int]:
    """splitmix64 in whole numbers of Python."""
    found = []
    for _ in range(count):
        key = (key + 0x9E3779B97F4A7C15) & WORD
        z = ((key ^ (key >> 30)) * 0xBF58476D1CE4E5B9) & WORD
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & WORD
        found.append(z ^ (z >> 31))
    return found


def key_that_gives(word: int) -> int:
    """The int64 key whose first splitmix64 number is `word`: each step of it undone."""
    for shift, factor in ((31, 0x94D049BB133111EB), (27, 0xBF58476D1CE4E5B9), (30, 1)):
        undone = word
        for _ in range(64 // shift):
            undone = word ^ (undone >> shift)
        word = undone * pow(factor, -1, 2**64) & WORD
    key = (word - 0x9E3779B97F4A7C15) & WORD
    return key - 2**64 if key >= 2**63 else key


def test_noise_is_that_of_splitmix64() -> None:
    assert scrambled(0, 2) == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4]  # its authors' numbers for seed 0
    keys = [0, 1, 123456789, 2**63 - 1]
    want = [[-math.log(-math.log1p(-((word >> 11) + 0.5) / 2**53)) for word in scrambled(key, 50)] for key in keys]
    noise = gumbel_noise(torch.tensor(keys), 50)
    assert noise.dtype == torch.float32
    torch.testing.assert_close(noise, torch.tensor(want), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("word", [0, 1, 2**11, 2**63, WORD - 2**36, WORD - 2**35, WORD - 1, WORD])
def test_noise_is_finite_at_the_ends_of_what_can_be_drawn(word: int) -> None:
    key = key_that_gives(word)
    assert scrambled(key, 1) == [word]
    noise = gumbel_noise(torch.tensor([key]), 1)
    assert noise.isfinite().all() and -3.0 < noise.item() < 38.0


def test_noise_has_the_mean_and_the_variance_of_gumbel_numbers() -> None:
    noise = gumbel_noise(keys_of(20, 8).flatten()[:1024], 512).double()
    n, variance = noise.numel(), math.pi**2 / 6
    assert abs(noise.mean() - 0.5772156649) < 4 * math.sqrt(variance / n)
    assert abs(noise.var() - variance) < 4 * variance * math.sqrt(4.4 / n)  # its kurtosis is 5.4
    centred = (noise - noise.mean()) / noise.std()
    for product in (centred[:, 1:] * centred[:, :-1], centred[1:] * centred[:-1]):  # neighbouring codes, slots
        assert product.mean().abs() < 4 / math.sqrt(product.numel())
    assert len(noise[:, 0].unique()) == len(noise)


def test_a_candidate_depends_on_caption_seed_and_number_alone() -> None:
    assert torch.equal(noise_keys("a cat", 1, 2, 9), noise_keys("a cat", 1, 2, 9))
    draws = [noise_keys(*key, 9) for key in (("a cat", 1, 2), ("a cat", 1, 3), ("a cat", 2, 2), ("a dog", 1, 2))]
    assert len(torch.stack(draws).unique()) == 36
    assert torch.equal(noise_keys("a cat", 1, 2, 9)[:4], noise_keys("a cat", 1, 2, 4))


# filters


def kept(logits: Tensor, top_k: int, top_p: float) -> list[list[bool]]:
    return (logits >= kept_from(logits, top_k, top_p)).tolist()


def test_top_k_keeps_k_codes_and_all_ties_at_the_edge() -> None:
    logits = torch.randn(50, 10, generator=torch.Generator().manual_seed(0))
    before = logits.clone()
    for k in range(1, 10):
        keep = logits >= kept_from(logits, k, 1.0)
        assert (keep.sum(-1) == k).all()
        assert (logits.masked_fill(~keep, torch.inf).amin(-1) > logits.masked_fill(keep, -torch.inf).amax(-1)).all()
    assert torch.equal(logits, before)
    assert kept(torch.tensor([[1.0, 3.0, 2.0, 2.0, 0.0]]), 2, 1.0) == [[False, True, True, True, False]]
    for k in (0, 10, 11):
        assert (logits >= kept_from(logits, k, 1.0)).all()


def test_top_p_keeps_the_fewest_likeliest_codes_that_reach_p() -> None:
    logits = torch.tensor([[0.15, 0.5, 0.05, 0.3]]).log()
    assert kept(logits, 0, 0.7) == [[False, True, False, True]]
    assert kept(logits, 0, 0.81) == [[True, True, False, True]]
    assert kept(logits, 0, 0.01) == [[False, True, False, False]]
    assert kept(logits, 0, 1.0) == [[True] * 4]
    assert kept(torch.zeros(1, 4), 0, 0.3) == [[True] * 4]  # ties


def test_top_p_counts_what_top_k_left() -> None:
    logits = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()
    assert kept(logits, 0, 0.6) == [[True, True, False, False]]
    assert kept(logits, 2, 0.57) == [[True, False, False, False]]  # 0.4 of 0.7 are 0.571
    assert kept(logits, 2, 0.58) == [[True, True, False, False]]


@pytest.mark.parametrize(("top_k", "top_p"), [(1, 1.0), (3, 1.0), (0, 0.1), (0, 0.5), (4, 0.6)])
def test_slack_tells_what_errors_of_half_of_it_can_do(top_k: int, top_p: float) -> None:
    random = torch.Generator().manual_seed(1)
    logits = torch.randn(500, 10, generator=random)
    keep = logits >= kept_from(logits, top_k, top_p)
    may, must = (logits >= kept_from(logits, top_k, top_p, 0.2, sure) for sure in (False, True))
    assert keep.gather(1, logits.argmax(-1, keepdim=True)).all()
    assert not (must & ~keep).any() and not (keep & ~may).any()
    ever, always = keep.clone(), keep.clone()
    for _ in range(300):
        wrong = logits + 0.0999 * (torch.randint(2, logits.shape, generator=random) * 2 - 1)
        kept_then = wrong >= kept_from(wrong, top_k, top_p)
        ever, always = ever | kept_then, always & kept_then
    assert not (ever & ~may).any() and not (must & ~always).any()
    assert ever.sum() > 0.8 * may.sum() and must.sum() > 0.7 * always.sum()  # and it tells no more than that


# picks


@pytest.mark.parametrize(
    ("taste", "want"),
    [
        (Taste(), [0.4, 0.3, 0.2, 0.1, 0.0]),
        (Taste(temperature=0.5), [16 / 30, 9 / 30, 4 / 30, 1 / 30, 0.0]),
        (Taste(top_k=2), [4 / 7, 3 / 7, 0.0, 0.0, 0.0]),
        (Taste(top_p=0.75), [4 / 9, 3 / 9, 2 / 9, 0.0, 0.0]),
    ],
)
def test_picks_follow_the_softmax_of_what_is_kept(taste: Taste, want: list[float]) -> None:
    n, probability = 40_000, torch.tensor([0.4, 0.3, 0.2, 0.1, 0.0])
    keys = torch.arange(n)
    codes, _ = pick(probability.log().expand(n, 5), keys, taste)
    for code, p in enumerate(want):
        assert abs((codes == code).sum().item() - n * p) <= 4 * math.sqrt(n * p * (1 - p))


@pytest.mark.parametrize(
    "taste",
    [Taste(), Taste(0.5), Taste(top_k=3), Taste(top_p=0.6), Taste(0.7, 5, 0.8), Taste(top_k=4, top_p=0.5, cfg_scale=2)],
    ids=str,
)
def test_no_certain_pick_flips_under_a_change_below_the_margin(taste: Taste, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(draw, "MARGIN", 0.02)
    random = torch.Generator().manual_seed(2)
    logits, keys = 2 * torch.randn(4000, 8, generator=random), torch.randint(2**62, (4000,), generator=random)
    picked, certain = pick(logits, keys, taste)
    assert 0.5 < certain.float().mean() < 0.99
    bound, flipped = 0.999 * taste.margin(logits) * taste.temperature, torch.zeros(4000, dtype=torch.bool)
    others = torch.ones_like(logits).scatter_(1, picked[:, None], -1.0)
    for number in range(200):
        signs = torch.randint(2, logits.shape, generator=random) * 2.0 - 1
        if number % 2:  # against the picked code
            signs = torch.where(torch.rand(logits.shape, generator=random) < 0.3, signs, others)
        flipped |= pick(logits + bound * signs, keys, taste)[0] != picked
    assert not (flipped & certain).any()
    assert flipped.sum() > 0.5 * (~certain).sum()  # nor is much called uncertain that is not


def test_a_single_code_is_always_picked_and_is_certain() -> None:
    picked, certain = pick(torch.zeros(3, 1), torch.arange(3), Taste(top_k=1, top_p=0.5))
    assert picked.tolist() == [0, 0, 0] and certain.all()


def test_a_margin_grows_with_guidance_with_cold_and_with_the_logits() -> None:
    """Guided logits are s caption + (1 - s) empty: the error of both is at most |s| + |1 - s| of one."""
    logits = torch.tensor([[0.1, -0.2], [3.0, -50.0]])
    for scale in (-1.0, 0.0, 0.5, 1.0, 3.0):
        want = draw.MARGIN * (abs(scale) + abs(1 - scale)) * torch.tensor([[1.0], [50.0]])
        torch.testing.assert_close(Taste(cfg_scale=scale).margin(logits), want)
    assert torch.equal(Taste(temperature=0.5).margin(logits), 2 * Taste().margin(logits))


# whole pictures


@pytest.mark.parametrize("taste", TASTES, ids=str)
def test_drawing_follows_the_full_forward_pass(taste: Taste) -> None:
    net = model()
    codes = drawn(net, 2, 3, taste)
    assert codes.shape == (6, N_IMAGE) and codes.dtype == torch.int64
    assert codes.min() >= 0 and codes.max() < CODES and len(codes.unique(dim=0)) == 6
    assert torch.equal(replayed(net, codes, 2, 3, taste), codes)


@pytest.mark.parametrize("taste", TASTES, ids=str)
def test_the_same_candidate_is_drawn_in_any_batch(taste: Taste) -> None:
    net = model()
    text, keys, want = texts(2), keys_of(2, 3), drawn(net, 2, 3, taste)

    def of(captions: list[int], rows: list[int]) -> Tensor:
        *_, last = draw_rows(net, text[captions], keys[rows], taste)
        return last

    assert torch.equal(of([1], [3, 4, 5]), want[3:])
    assert torch.equal(torch.cat([of([row // 3], [row]) for row in range(6)]), want)
    assert torch.equal(of([0, 0, 0, 1, 1, 1], [0, 1, 2, 3, 4, 5]), want)
    assert torch.equal(of([1, 0], [5, 3, 2, 0]), want[[5, 3, 2, 0]])


@pytest.mark.parametrize("taste", TASTES, ids=str)
def test_settling_every_draw_changes_nothing(taste: Taste, monkeypatch: pytest.MonkeyPatch) -> None:
    net = model()
    want = drawn(net, 2, 3, taste)
    passes = []
    whole = Decoder.whole

    def counted(self: Decoder, codes: Tensor, candidate: int, slot: int) -> Tensor:
        passes.append((candidate, slot))
        return whole(self, codes, candidate, slot)

    monkeypatch.setattr(Decoder, "whole", counted)
    assert torch.equal(drawn(net, 2, 3, taste), want) and len(passes) < 3
    monkeypatch.setattr(draw, "MARGIN", 1e9)
    assert torch.equal(drawn(net, 2, 3, taste), want)
    assert passes[-6 * N_IMAGE :] == [(row, slot) for slot in range(N_IMAGE) for row in range(6)]


@pytest.mark.parametrize("taste", TASTES, ids=str)
def test_arithmetic_that_errs_by_less_than_the_margin_changes_no_code(
    taste: Taste, monkeypatch: pytest.MonkeyPatch
) -> None:
    net, step = model(), Decoder.step
    want = drawn(net, 4, 8, taste)
    random = torch.Generator().manual_seed(4)

    def noisy(self: Decoder, before: Tensor, slot: int) -> Tensor:
        logits = step(self, before, slot)
        error = 0.99 * 0.05 * (abs(taste.cfg_scale) + abs(1 - taste.cfg_scale))
        return logits + error * (torch.randint(2, logits.shape, generator=random) * 2 - 1)

    monkeypatch.setattr(Decoder, "step", noisy)
    assert not torch.equal(drawn(net, 4, 8, taste), want)  # the margin of rounding is not enough for such noise
    monkeypatch.setattr(draw, "MARGIN", 0.05)
    assert torch.equal(drawn(net, 4, 8, taste), want)


def test_16_bit_weights_are_never_settled(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> Tensor:
        raise AssertionError("settled")

    monkeypatch.setattr(draw, "MARGIN", 1e9)
    monkeypatch.setattr(Decoder, "whole", refuse)
    assert drawn(model().bfloat16(), 1, 2).shape == (2, N_IMAGE)
    with pytest.raises(AssertionError, match="settled"):
        drawn(model(), 1, 2)


@pytest.mark.parametrize("taste", [Taste(), Taste(cfg_scale=2.0)], ids=str)
@pytest.mark.parametrize(
    "is_given",
    [
        lambda slot: slot < 1,
        lambda slot: slot < GRID,
        lambda slot: slot < GRID + 2,
        lambda slot: slot < N_IMAGE - 1,
        lambda slot: slot % 2 == 1,
        lambda slot: slot in (0, 1, 4, 8),
        lambda slot: slot >= GRID,
    ],
)
def test_codes_that_are_given_are_kept_wherever_they_stand(is_given: Callable[[int], bool], taste: Taste) -> None:
    net, given = model(), torch.tensor([is_given(slot) for slot in range(N_IMAGE)])
    known = torch.randint(CODES, (2, N_IMAGE), generator=torch.Generator().manual_seed(5))
    known[:, ~given] = UNKNOWN
    codes = drawn(net, 2, 3, taste, known)
    assert torch.equal(codes[:, given], known.repeat_interleave(3, 0)[:, given])
    assert torch.equal(replayed(net, codes, 2, 3, taste)[:, ~given], codes[:, ~given])


def test_each_caption_may_have_other_codes_given() -> None:
    known = torch.full((2, N_IMAGE), UNKNOWN)
    known[0, :5], known[1, 2:4] = 3, 7
    net = model()
    codes = drawn(net, 2, 3, known=known)
    again = replayed(net, codes, 2, 3, Taste())
    assert (codes[:3, :5] == 3).all() and (codes[3:, 2:4] == 7).all()
    assert torch.equal(codes[:3, 5:], again[:3, 5:]) and torch.equal(codes[3:, :2], again[3:, :2])
    assert torch.equal(codes[3:, 4:], again[3:, 4:])


@pytest.mark.parametrize(("lead", "lengths"), [(0, [3, 6, 9]), (2, [3, 6, 9]), (3, [6, 9]), (8, [9]), (9, [9])])
def test_rows_come_in_order_and_lead_to_the_end_result(lead: int, lengths: list[int]) -> None:
    known = torch.full((2, N_IMAGE), UNKNOWN)
    known[:, :lead] = 4
    rows = [codes.clone() for codes in draw_rows(model(), texts(2), keys_of(2, 3), Taste(), known)]
    assert [codes.shape[1] for codes in rows] == lengths
    assert all(torch.equal(codes, rows[-1][:, : codes.shape[1]]) for codes in rows)
    assert (rows[-1][:, :lead] == 4).all()


@pytest.mark.parametrize("taste", TASTES, ids=str)
def test_inputs_are_not_written_to(taste: Taste) -> None:
    known = torch.full((2, N_IMAGE), UNKNOWN)
    known[:, 4] = 2
    inputs = texts(2), keys_of(2, 3), known
    copies = [tensor.clone() for tensor in inputs]
    for _ in draw_rows(model(), inputs[0], inputs[1], taste, known):
        pass
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(inputs, copies, strict=True))
