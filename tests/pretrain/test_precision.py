"""The rule by which gradient scales move, against Ramesh et al. 2021, appendix D, number by number."""

import json
import math

import pytest
import torch
from torch import Tensor

from data_pipeline.loader import words_in
from pretrain.model import Transformer, text_image_loss
from pretrain.optim import REST, resblock_of
from pretrain.precision import CALM, GradientScales
from tests.pretrain.engine_cases import MODEL, SIZES, batch_of

CPU = torch.device("cpu")


def scales(tied: bool = False) -> GradientScales:
    return GradientScales(["layers.0.attention", "layers.0.mlp"], tied, CPU)


def test_scales_start_at_2_to_the_13() -> None:
    assert scales().values.tolist() == [2.0**13] * 2


def test_a_scale_doubles_in_a_thousand_good_updates() -> None:
    one = scales()
    for step in range(1000):
        one.learn(step, [False, False])
    assert one.values.tolist() == pytest.approx([2.0**14] * 2, rel=1e-5)


def test_a_bad_update_divides_by_the_root_of_two_and_only_the_bad_ones_scale() -> None:
    one = scales()
    one.learn(0, [True, False])
    assert one.values.tolist() == pytest.approx([2.0**12.5, 2.0**13.001], rel=1e-6)
    assert one.skips == [1, 0]


def test_a_scale_is_not_divided_again_within_125_updates_nor_grown_by_bad_ones() -> None:
    one = scales()
    for step in range(CALM):
        one.learn(step, [True, False])
    assert one.log2[0] == 12.5
    one.learn(CALM, [True, False])
    assert one.log2[0] == 12.0 and one.skips[0] == CALM + 1


def test_a_scale_stays_between_2_to_the_7_and_2_to_the_24() -> None:
    one = scales()
    for step in range(20 * CALM):
        one.learn(step, [True, False])
    assert one.log2[0] == 7.0
    for step in range(20_000):
        one.learn(20 * CALM + step, [False, False])
    assert one.log2 == [24.0, 24.0]


def test_tied_scales_move_together_and_are_told_as_one() -> None:
    one = scales(tied=True)
    one.learn(0, [False, True])
    assert one.values.tolist() == pytest.approx([2.0**12.5] * 2)
    assert one.metrics() == {"scale/all": 12.5, "skips/all": 1.0}


def test_scales_are_told_by_the_names_of_their_resblocks() -> None:
    assert scales().metrics() == {
        "scale/layers.0.attention": 13.0, "scale/layers.0.mlp": 13.0,
        "skips/layers.0.attention": 0.0, "skips/layers.0.mlp": 0.0,
    }  # fmt: skip


def test_the_backward_pass_sees_the_new_scales_in_the_old_tensor() -> None:
    one = scales()
    seen = one.values[1]
    one.learn(0, [False, True])
    assert seen.item() == pytest.approx(2.0**12.5)


def test_a_restored_state_goes_on_to_the_same_bits() -> None:
    one, other = scales(), scales()
    bad = [[step % 7 == 0, step % 131 == 0] for step in range(600)]
    for step in range(300):
        one.learn(step, bad[step])
    other.restore(json.loads(json.dumps(one.state())))
    for step in range(300, 600):
        one.learn(step, bad[step])
        other.learn(step, bad[step])
    assert torch.equal(one.values, other.values) and one.state() == other.state()
    assert math.isfinite(one.log2[0])


def gradients(net: Transformer) -> dict[str, Tensor]:
    batch = batch_of(0)
    logits = net(batch.text, batch.image)
    loss = text_image_loss(*logits, batch.text, batch.image, 0.125, words_in(batch)).total
    names, parameters = zip(*net.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


def network() -> Transformer:
    torch.manual_seed(0)
    net = Transformer(MODEL, SIZES)
    torch.nn.init.normal_(net.image_head.weight, std=0.1)  # heads of zeros send nothing back
    return net


def test_a_resblocks_parameter_gradients_carry_its_own_scale_and_all_others_none() -> None:
    net = network()
    want = gradients(net)
    log2 = torch.arange(8, 8 + len(net.resblocks()))
    net.scale_gradients(log2.float().exp2())
    got = gradients(net)
    for name, gradient in got.items():
        block = resblock_of(name, list(net.resblocks()))
        scale = 1.0 if block == REST else 2.0 ** float(log2[list(net.resblocks()).index(block)])
        assert gradient.dtype == torch.float32  # embeddings, gains and biases; and of matrices what float16 gave
        assert (gradient / scale - want[name]).norm() < 0.02 * want[name].norm(), name


def test_only_branches_are_in_float16() -> None:
    net = network()
    net.scale_gradients(torch.full((len(net.resblocks()),), 2.0**13))
    seen: dict[str, torch.dtype] = {}
    for name, block in net.resblocks().items():
        block.register_forward_hook(
            lambda module, inputs, output, name=name: seen.update(
                {name: output[0].dtype, f"{name}.inner": output[1].dtype}
            )
        )
    batch = batch_of(0)
    text, image = net(batch.text, batch.image)
    assert text.dtype == image.dtype == torch.float32
    for name in net.resblocks():
        assert seen[name] == torch.float32 and seen[f"{name}.inner"] == torch.float16


def test_an_overflow_in_one_resblock_leaves_the_gradients_of_all_others_as_they_were() -> None:
    net = network()
    scales = torch.full((len(net.resblocks()),), 2.0**13)
    net.scale_gradients(scales)
    scales[4] = 2.0**60  # of layers.2.attention: every gradient that enters its branch is infinite
    got = gradients(net)
    is_finite = {name: bool(gradient.isfinite().all()) for name, gradient in got.items()}
    assert not is_finite["layers.2.attention.inner.out.weight"]
    assert all(is_finite[name] for name in got if not name.startswith("layers.2.attention."))
    for name in got:  # what is filtered out is missing, and only upstream
        if name.startswith(("layers.3.", "layers.2.mlp.")):
            assert got[name].norm() > 0
