"""The definitions against slower ones, written out in float64."""

import math

import torch

from kernels.layout import Layout, Sparsity
from kernels.reference import masked_attention, relaxed_codes

LAYOUT = Layout(3, 4, 3)


def test_masked_attention_is_a_softmax_over_the_allowed_keys() -> None:
    random = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 2, 15, 8, generator=random, dtype=torch.float64) for _ in range(3))
    for pattern in ("row", "column", "conv"):
        mask = Sparsity(pattern, LAYOUT, kernel=3).mask()
        out = masked_attention(q, k, v, mask)
        for b, h, s in torch.cartesian_prod(torch.arange(2), torch.arange(2), torch.arange(15)).tolist():
            keys = mask[s].nonzero().flatten()
            scores = (k[b, h, keys] @ q[b, h, s]) / math.sqrt(8)
            weights = scores.exp() / scores.exp().sum()
            torch.testing.assert_close(out[b, h, s], weights @ v[b, h, keys], rtol=1e-12, atol=1e-12)


def test_keys_that_are_masked_get_no_gradient_and_have_no_say() -> None:
    random = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(1, 1, 15, 4, generator=random, requires_grad=True) for _ in range(3))
    mask = Sparsity("column", LAYOUT).mask()
    seen, unseen = mask[10].nonzero().flatten(), (~mask[10]).nonzero().flatten()
    out = masked_attention(q, k, v, mask)[0, 0, 10]
    out.sum().backward()
    assert k.grad is not None and v.grad is not None
    assert v.grad[0, 0, seen].ne(0).all() and v.grad[0, 0, unseen].eq(0).all() and k.grad[0, 0, unseen].eq(0).all()
    with torch.no_grad():
        k[..., unseen, :] += 3.0
        v[..., unseen, :] -= 5.0
        assert torch.equal(masked_attention(q, k, v, mask)[0, 0, 10], out)


def test_relaxed_codes_weights_follow_the_definition() -> None:
    random = torch.Generator().manual_seed(2)
    logits = torch.randn(5, 7, generator=random, dtype=torch.float64)
    uniform = torch.rand(5, 7, generator=random, dtype=torch.float64)
    weights, kl = relaxed_codes(logits, uniform, temperature=0.7)
    for row in range(5):
        scores = [
            math.exp((x - math.log(-math.log(u))) / 0.7)
            for x, u in zip(logits[row].tolist(), uniform[row].tolist(), strict=True)
        ]
        expected = torch.tensor(scores, dtype=torch.float64) / sum(scores)
        torch.testing.assert_close(weights[row], expected, rtol=1e-10, atol=0)
        p = [math.exp(x) / sum(map(math.exp, logits[row].tolist())) for x in logits[row].tolist()]
        assert math.isclose(kl[row].item(), sum(x * math.log(x * 7) for x in p), rel_tol=1e-6)


def test_divergence_is_zero_for_even_odds_and_log_k_for_certainty() -> None:
    logits = torch.stack([torch.full((16,), 3.0), torch.full((16,), -200.0)])
    logits[1, 4] = 200.0
    _, kl = relaxed_codes(logits, torch.full((2, 16), 0.5), temperature=1.0)
    torch.testing.assert_close(kl, torch.tensor([0.0, math.log(16)]), rtol=1e-5, atol=1e-5)


def test_cold_weights_draw_each_code_as_often_as_its_probability() -> None:
    p = torch.tensor([0.5, 0.3, 0.15, 0.05])
    uniform = torch.rand(20_000, 4, generator=torch.Generator().manual_seed(3))
    weights, _ = relaxed_codes(p.log().expand(20_000, 4), uniform, temperature=1e-3)
    assert weights.max(-1).values.median() > 0.999
    torch.testing.assert_close(weights.mean(0), p, rtol=0, atol=0.012)
