"""Logits of the cached steps are those of the full pass: any pattern, any prefix, with and without guidance."""

import pytest
import torch
from torch import Tensor

from data_pipeline.loader import PAD
from pretrain.config import TransformerConfig
from pretrain.decoder import Decoder
from pretrain.model import Sizes, Transformer

GRID, CODES, WORDS = 4, 10, 16


def model(n_layers: int = 3) -> Transformer:
    torch.manual_seed(0)
    config = TransformerConfig(n_text=5, n_layers=n_layers, n_heads=2, d_head=8, conv_kernel=3)
    made = Transformer(config, Sizes(WORDS, CODES, GRID))
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return made.eval()


def batch(captions: int = 2, candidates: int = 3, lead: int = 0) -> tuple[Tensor, Tensor]:
    """text (C, T-1) and codes (C N, I), whose first `lead` are alike for all candidates of a caption."""
    random = torch.Generator().manual_seed(1)
    text = torch.randint(WORDS, (captions, 4), generator=random)
    text[0, 2:] = PAD
    codes = torch.randint(CODES, (captions, candidates, GRID**2), generator=random)
    codes[:, :, :lead] = codes[:, :1, :lead]
    return text, codes.flatten(0, 1)


def full(net: Transformer, text: Tensor, codes: Tensor, scale: float) -> Tensor:
    """(C N, I, K) logits of the pass over all slots, guided by the formula."""
    text = text.repeat_interleave(len(codes) // len(text), 0)
    caption, empty = net(text, codes)[1], net(torch.full_like(text, PAD), codes)[1]
    return scale * caption + (1 - scale) * empty


@torch.no_grad()
def stepped(decoder: Decoder, codes: Tensor, lead: int) -> Tensor:
    """(C N, I - lead, K) logits of the steps after `lead` codes were read."""
    decoder.read(codes[:: decoder.candidates, :lead])
    slots = range(lead, codes.shape[1])
    return torch.stack([decoder.step(codes[:, max(slot - 1, 0)], slot) for slot in slots], 1)


@pytest.mark.parametrize("scale", [1.0, 2.5, 0.0])
@pytest.mark.parametrize("n_layers", [1, 2, 3, 4, 5, 6])
def test_steps_give_the_logits_of_the_full_pass(n_layers: int, scale: float) -> None:
    net = model(n_layers)
    for lead in (0, 1, GRID - 1, GRID, GRID + 2, GRID**2 - 1):
        text, codes = batch(lead=lead)
        with torch.no_grad():
            want = full(net, text, codes, scale)[:, lead:]
        # float32 sums in another order, six layers deep; logits are some units large
        torch.testing.assert_close(stepped(Decoder(net, text, 3, scale), codes, lead), want, atol=5e-5, rtol=1e-5)


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_one_candidates_whole_pass_is_bitwise_the_same_whatever_the_batch(scale: float) -> None:
    net = model()
    text, codes = batch(3, 2)
    together = Decoder(net, text, 2, scale)
    with torch.no_grad():
        want = full(net, text, codes, scale)
        for candidate in range(6):
            caption = text[candidate // 2][None]
            alone, in_four = Decoder(net, caption, 1, scale), Decoder(net, caption, 4, scale)
            for slot in (0, 7, 15):
                logits = together.whole(codes[candidate], candidate, slot)
                assert torch.equal(logits, alone.whole(codes[candidate], 0, slot))
                assert torch.equal(logits, in_four.whole(codes[candidate], 3, slot))
                torch.testing.assert_close(logits, want[candidate, slot], atol=5e-5, rtol=1e-5)


def test_a_whole_pass_does_not_look_at_what_comes_after() -> None:
    net = model()
    text, codes = batch(1, 1)
    decoder, other = Decoder(net, text, 1), codes.clone()
    other[:, 6:] = (other[:, 6:] + 1) % CODES
    with torch.no_grad():
        assert torch.equal(decoder.whole(codes[0], 0, 6), decoder.whole(other[0], 0, 6))
        assert not torch.equal(decoder.whole(codes[0], 0, 7), decoder.whole(other[0], 0, 7))


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_nothing_is_written_into_the_inputs(scale: float) -> None:
    text, codes = batch(lead=6)
    kept = text.clone(), codes.clone()
    stepped(Decoder(model(), text, 3, scale), codes, 6)
    assert torch.equal(text, kept[0]) and torch.equal(codes, kept[1])


def test_guidance_doubles_the_captions_kept_and_text_is_kept_once_for_all_candidates() -> None:
    net = model()
    text, _ = batch()
    one, guided, many = (Decoder(net, text, *choice).cache_bytes for choice in ((1,), (1, 2.0), (4,)))
    assert guided == 2 * one and many < 4 * one
    text_bytes = 2 * 3 * len(text) * net.config.n_text * net.config.d_model * 4  # keys and values of three layers
    assert many - text_bytes == 4 * (one - text_bytes)


def test_16_bit_weights_step_as_well() -> None:
    net = model().bfloat16()
    text, codes = batch()
    with torch.no_grad():
        want = full(net, text, codes, 1.0)
    logits = stepped(Decoder(net, text, 3), codes, 0)
    assert logits.dtype == torch.float32
    assert (logits - want).norm() / want.norm() < 0.03  # some roundings of 0.4 %, three layers deep
