"""A bad number is traced to the module, the rank and the samples where it came up."""

import pytest
import torch

from pretrain.bad_numbers import bad_weights, some, told, watched
from pretrain.model import Transformer
from tests.pretrain.engine_cases import MODEL, SIZES, batch_of


@pytest.fixture
def model() -> Transformer:
    torch.manual_seed(0)
    return Transformer(MODEL, SIZES)


def forward(model: Transformer) -> list[str]:
    batch = batch_of(0)
    with torch.no_grad(), watched(model) as found:
        model(batch.text, batch.image)
    return found


def test_a_sound_model_has_nothing_to_tell(model: Transformer) -> None:
    assert forward(model) == [] and bad_weights(model) == [] and told(0, [], [], [], ["a"]) == ""


@pytest.mark.parametrize("name", ["layers.2.mlp.inner.enter", "layers.0.attention.inner.qkv", "image_head"])
def test_the_first_module_with_a_bad_output_is_named(name: str, model: Transformer) -> None:
    with torch.no_grad():
        model.get_submodule(name).weight.fill_(3e38)  # finite, but no product with it is
        model.get_submodule(name).bias.fill_(3e38)
        model.norm.bias.fill_(3e38)
    assert forward(model)[0] == name
    assert told(3, forward(model), [], ["x"], ["s1", "s2"]) == f"rank 3: first in {name}, samples s1, s2"


def test_watching_leaves_no_hooks_behind(model: Transformer) -> None:
    forward(model)
    assert not any(module._forward_hooks for module in model.modules())


def test_bad_weights_come_before_what_they_do(model: Transformer) -> None:
    with torch.no_grad():
        model.layers[1].mlp.inner.enter.weight[0, 0] = torch.nan
    names = bad_weights(model)
    assert names == ["layers.1.mlp.inner.enter.weight"]
    assert told(0, forward(model), names, [], ["k"]) == f"rank 0: weights {names[0]} are not finite"


def test_gradients_are_told_from_where_the_backward_pass_met_them_first() -> None:
    assert told(1, [], [], ["layers.0.norm.gain", "layers.3.out.weight"], ["k"]) == (
        "rank 1: the forward pass is clean, the gradients of layers.3.out.weight, layers.0.norm.gain are not finite"
    )


def test_many_names_are_counted() -> None:
    assert some(["a", "b", "c", "d", "e", "f"]) == "a, b, c, d and 2 more"
