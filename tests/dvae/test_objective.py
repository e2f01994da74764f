"""The objective, its noise and its average are what their papers say, in every precision and however it is computed."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data_pipeline.order import GUMBEL, counter_random
from dvae.average import Average
from dvae.config import DvaeConfig
from dvae.likelihood import map_pixels, pixel_nats
from dvae.model import Dvae
from dvae.noise import uniform_rows
from dvae.objective import Objective, Terms, effective_kl_weight, hardened
from kernels.relaxed_codes import relaxed_codes

SHAPE = DvaeConfig(image_side=16, fold=1, width=16, n_groups=3, n_blocks=2, n_init=8, codebook=32)
PAPER = DvaeConfig(image_side=256, fold=1, width=256, n_groups=4, n_blocks=2, n_init=128, codebook=8192)
GRID = (SHAPE.grid, SHAPE.grid, SHAPE.codebook)
TAU, BETA, FLOOR = 0.7, 6.6, -20.0


def made(computes: torch.dtype = torch.float32, recompute_blocks: bool = False) -> Dvae:
    torch.manual_seed(0)
    model = Dvae(SHAPE, computes, recompute_blocks)
    for block in (module for module in model.modules() if hasattr(module, "gain")):
        block.gain = 1.0  # as loud as the skips, so that what happens in them is seen
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def mapped(count: int = 3) -> Tensor:
    pixels = torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    return map_pixels(pixels).contiguous(memory_format=torch.channels_last)


def terms_of(model: Dvae, relaxation: str = "gumbel") -> Terms:
    return Objective(model, FLOOR, relaxation)(mapped(), uniform_rows(0, 5, range(3), GRID), TAU, BETA)  # type: ignore[arg-type]


def gradients(model: Dvae, terms: Terms) -> dict[str, Tensor]:
    terms.loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_the_loss_is_the_papers_sum_over_its_number_of_values() -> None:
    """Appendix A.2: likelihood summed over 3 P^2 values, KL over G^2 positions, all divided by 3 P^2."""
    model = made().double()
    for module in model.modules():
        if hasattr(module, "computes"):
            module.computes = torch.float64
    x, noise = mapped().double(), uniform_rows(0, 5, range(3), GRID).double()
    logits = model.encoder.head(model.encoder.features(x)).permute(0, 2, 3, 1)
    relaxed = torch.softmax((logits - torch.log(-torch.log(noise))) / TAU, -1)
    nats = pixel_nats(model.decoder(relaxed.permute(0, 3, 1, 2)).double(), x, FLOOR)
    p = torch.softmax(logits, -1)
    kl = (p * (p.log() + math.log(SHAPE.codebook))).sum(-1)
    want = (nats.sum((1, 2, 3)) + BETA * kl.sum((1, 2))).mean() / (3 * 16 * 16)
    found = terms_of(made())
    assert found.loss.item() == pytest.approx(want.item(), rel=1e-5)  # float32
    assert found.kl.item() == pytest.approx(kl.mean().item(), rel=1e-4)
    assert torch.equal(found.codes, logits.argmax(-1))


def test_the_likelihood_that_is_asked_for_is_the_one_that_counts() -> None:
    model = made()
    x, noise = mapped(), uniform_rows(0, 5, range(3), GRID)
    relaxed, _ = relaxed_codes(model.encoder(x).permute(0, 2, 3, 1), noise, TAU)
    parameters = model.decoder(relaxed.permute(0, 3, 1, 2))
    laplace, normal = (
        Objective(model, FLOOR, likelihood=likelihood)(x, noise, TAU, BETA).nats
        for likelihood in ("logit-laplace", "logit-normal")
    )
    torch.testing.assert_close(laplace, pixel_nats(parameters, x, FLOOR).mean())
    torch.testing.assert_close(normal, pixel_nats(parameters, x, FLOOR, "logit-normal").mean())
    assert abs(laplace - normal) > 0.01


def test_the_kl_is_weighted_as_appendix_a2_normalises_it() -> None:
    assert effective_kl_weight(PAPER, 6.6) == pytest.approx(6.6 / 192)


def test_checkpointed_blocks_change_no_bit_and_keep_less() -> None:
    kept: dict[bool, int] = {}
    found = {}
    for recompute in (False, True):
        model, total = made(recompute_blocks=recompute), [0]

        def count(tensor: Tensor, total: list[int] = total) -> Tensor:
            total[0] += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            terms = terms_of(model)
        kept[recompute] = total[0]
        found[recompute] = gradients(model, terms) | {"loss": terms.loss.detach()}
    assert kept[True] < 0.6 * kept[False]
    assert found[True].keys() == found[False].keys()
    assert all(torch.equal(found[True][name], found[False][name]) for name in found[False])


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_16_bit_reaches_all_convolutions_but_the_two_next_to_the_relaxation(kind: torch.dtype) -> None:
    model, seen = made(kind), {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda m, x, y, name=name: seen.update({name: y.dtype}))
    terms = terms_of(model)
    assert {name for name, one in seen.items() if one == torch.float32} == {"encoder.head", "decoder.embed"}
    assert {one for name, one in seen.items() if name not in ("encoder.head", "decoder.embed")} == {kind}
    assert terms.loss.dtype == terms.nats.dtype == terms.kl.dtype == torch.float32
    assert all(g.dtype == torch.float32 for g in gradients(model, terms).values())
    # 2^-8 and 2^-11 a rounding, some dozen of them in a row on the way through both halves
    assert terms.loss.item() == pytest.approx(terms_of(made()).loss.item(), rel=30 * torch.finfo(kind).eps)


def test_straight_through_decodes_hard_codes_with_the_gradient_of_the_relaxed() -> None:
    model = made()
    hard = terms_of(model, "straight-through")
    noisy = model.encoder(mapped()).permute(0, 2, 3, 1) - torch.log(-torch.log(uniform_rows(0, 5, range(3), GRID)))
    codes = noisy.argmax(-1)
    want = pixel_nats(model.decode(codes), mapped(), FLOOR).mean()
    assert hard.nats.item() == pytest.approx(want.item(), rel=1e-6)
    assert hard.nats.item() != terms_of(model).nats.item()
    # the gradient that reaches the encoder is that of the relaxed weights, taken where the hard ones are decoded
    weights = torch.softmax(noisy / TAU, -1)
    one_hot = hardened(weights).requires_grad_()
    nats = pixel_nats(model.decoder(one_hot.permute(0, 3, 1, 2)), mapped(), FLOOR).mean()
    (toward,) = torch.autograd.grad(nats, one_hot)
    (want_head,) = torch.autograd.grad(weights, model.encoder.head.weight, toward)
    (found_head,) = torch.autograd.grad(hard.nats, model.encoder.head.weight)
    torch.testing.assert_close(found_head, want_head, rtol=1e-4, atol=1e-9)  # other order of sums


def test_one_process_draws_the_noise_of_a_step_as_one_stream() -> None:
    """The bits that runs were made with before there were ranks."""
    generator = torch.Generator().manual_seed(int(counter_random(7, GUMBEL, 3).integers(2**62)))
    tiny = torch.finfo(torch.float32).eps
    want = torch.rand((4, *GRID), generator=generator).clamp_(tiny, 1 - tiny)
    assert torch.equal(uniform_rows(7, 3, range(4), GRID), want)


def test_a_sample_has_the_same_noise_on_whatever_rank_it_is() -> None:
    whole = uniform_rows(7, 3, range(6), GRID)
    assert torch.equal(torch.cat([uniform_rows(7, 3, range(i, i + 2), GRID) for i in (0, 2, 4)]), whole)
    assert not torch.equal(uniform_rows(7, 4, range(6), GRID), whole)
    assert whole.min() > 0 and whole.max() < 1


def test_the_average_is_the_mean_of_the_weights_and_then_forgets_the_old() -> None:
    layer = nn.Linear(2, 1, bias=False)
    average = Average(layer, 0.75)
    values = [1.0, 2.0, 6.0, 4.0, 10.0]
    wanted = [1.0, 1.5, 3.0, 3.25, 0.75 * 3.25 + 2.5]  # means of up to four, then a quarter of the new
    for step, (value, want) in enumerate(zip(values, wanted, strict=True)):
        nn.init.constant_(layer.weight, value)
        average.update(step)
        assert average.model.weight.flatten().tolist() == pytest.approx([want] * 2)
    assert not average.model.weight.requires_grad and layer.weight.requires_grad
    other = Average(copy.deepcopy(layer), 0.75)
    other.restore(average.state())
    assert torch.equal(other.model.weight, average.model.weight)


def test_a_hard_code_is_one_hot_and_has_no_gradient() -> None:
    weights = torch.rand(2, 3, 5, requires_grad=True)
    hard = hardened(weights)
    assert not hard.requires_grad and torch.equal(hard, F.one_hot(weights.argmax(-1), 5).float())
