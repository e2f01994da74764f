"""Sampling: filters act on image codes only, draws follow the distribution, batches change nothing."""

import torch

from pretrain.config import TransformerConfig
from pretrain.draw import draw_codes, filter_logits, pick, uniforms
from pretrain.model import Sizes, Transformer

CONFIG = TransformerConfig(n_text=5, n_layers=3, n_heads=2, d_head=8, conv_kernel=3)


def model() -> Transformer:
    torch.manual_seed(0)
    made = Transformer(CONFIG, Sizes(16, 10, 3))
    torch.nn.init.normal_(made.image_head.weight, std=1.0)
    return made.eval()


def test_top_k_keeps_k_codes_and_leaves_its_input_alone() -> None:
    logits = torch.randn(4, 10)
    before = logits.clone()
    kept = filter_logits(logits, 3, 1.0)
    assert torch.equal(logits, before)
    assert (kept.isfinite().sum(-1) == 3).all()
    assert torch.equal(kept.argmax(-1), logits.argmax(-1))


def test_top_p_keeps_the_fewest_likeliest_codes_that_reach_p() -> None:
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    assert filter_logits(logits, 0, 0.7).isfinite().tolist() == [[True, True, False, False]]
    assert filter_logits(logits, 0, 0.01).isfinite().tolist() == [[True, False, False, False]]
    assert filter_logits(logits, 0, 1.0).isfinite().all()


def test_picks_follow_the_distribution() -> None:
    probability = torch.tensor([0.5, 0.0, 0.3, 0.2])
    uniform = torch.arange(0, 1, 1 / 1000, dtype=torch.float64)
    codes = pick(probability.log().expand(1000, 4), uniform)
    assert (torch.bincount(codes, minlength=4) - 1000 * probability).abs().max() <= 1


def test_a_candidate_depends_on_caption_seed_and_number_alone() -> None:
    assert torch.equal(uniforms("a cat", 1, 2, 9), uniforms("a cat", 1, 2, 9))
    draws = [uniforms(*key, 9) for key in (("a cat", 1, 2), ("a cat", 1, 3), ("a cat", 2, 2), ("a dog", 1, 2))]
    assert len(torch.stack(draws).unique(dim=0)) == 4


def test_the_same_candidate_is_drawn_in_any_batch() -> None:
    net = model()
    text = torch.randint(16, (6, 4))
    uniform = torch.stack([uniforms("x", 0, number, 9) for number in range(6)])
    whole = draw_codes(net, text, uniform, 1.0, 0, 1.0)
    single = torch.cat([draw_codes(net, text[i : i + 1], uniform[i : i + 1], 1.0, 0, 1.0) for i in range(6)])
    assert torch.equal(whole, single)


def test_drawing_follows_the_full_forward_pass() -> None:
    net = model()
    text = torch.randint(16, (3, 4))
    uniform = torch.rand(3, 9, dtype=torch.float64)
    codes = draw_codes(net, text, uniform, 0.8, 5, 0.9)
    logits = net(text, codes)[1] / 0.8
    want = torch.stack([pick(filter_logits(logits[:, i], 5, 0.9), uniform[:, i]) for i in range(9)], 1)
    assert torch.equal(codes, want)
