"""What each logit may and must depend on; and how it is computed changes nothing."""

import shutil
from typing import get_args

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from data_pipeline.loader import PAD
from kernels.attention import How
from kernels.layout import Sparsity, layer_pattern
from pretrain.config import TransformerConfig
from pretrain.model import Losses, Recompute, Sizes, Transformer, text_image_loss

CONFIG = TransformerConfig(n_text=6, n_layers=5, n_heads=2, d_head=8, conv_kernel=3)
SIZES = Sizes(text_vocab=20, codebook=12, grid=4)


def model(how: How = "auto", recompute: Recompute = "none") -> Transformer:
    torch.manual_seed(0)
    made = Transformer(CONFIG, SIZES, how, recompute)
    for parameter in made.parameters():  # heads start at zero, which would hide everything
        torch.nn.init.normal_(parameter, std=0.3)
    return made


def batch(count: int = 2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    text = torch.randint(20, (count, 5), generator=generator)
    text[:, 3:] = PAD
    return text, torch.randint(12, (count, 16), generator=generator)


def reach() -> Tensor:
    """(I, S) bool: which slots image logit i is promised, through all layers of CONFIG."""
    seen = torch.eye(22, dtype=torch.bool)
    for number in range(CONFIG.n_layers, 0, -1):
        mask = Sparsity(layer_pattern(number, CONFIG.n_layers), model().layout, CONFIG.conv_kernel).mask()
        seen = (seen.double() @ mask.double()) > 0
    return seen[6:]


def losses(net: Transformer) -> Losses:
    text, image = batch()
    return text_image_loss(*net(text, image), text, image, 1 / 8, 6)


def loss_and_gradients(net: Transformer) -> dict[str, Tensor]:
    total = losses(net).total
    total.backward()
    gradients = {name: parameter.grad for name, parameter in net.named_parameters() if parameter.grad is not None}
    assert gradients.keys() == dict(net.named_parameters()).keys()
    return gradients | {"loss": total.detach()}


def test_each_image_logit_sees_all_of_the_promised_past_and_no_future() -> None:
    net = model()
    text, image = batch(1)
    before = F.pad(image[:, :-1], (1, 0))
    slots = torch.cat([net.embed_text(text), net.embed_image(before, torch.arange(16))], 1).detach().requires_grad_()
    hidden = net.hidden(slots, net.attends)
    depends = torch.stack(
        [
            torch.autograd.grad(hidden[0, 6 + i].sum(), slots, retain_graph=True)[0][0].abs().sum(-1) > 0
            for i in range(16)
        ]
    )
    assert torch.equal(depends, reach())
    assert torch.equal(depends, torch.ones(16, 22).tril(6).bool())  # at this depth: the whole past


def test_each_layer_has_the_papers_pattern() -> None:
    patterns = [attend.keywords["sparsity"].pattern for attend in model().attends]
    assert patterns == ["row", "column", "row", "row", "conv"]


def test_text_logits_do_not_see_the_image() -> None:
    net = model()
    text, image = batch()
    other = (image + 1) % 12
    assert torch.equal(net(text, image)[0], net(text, other)[0])


def test_a_text_logit_does_not_see_its_own_token() -> None:
    net = model()
    text, image = batch()
    other = text.clone()
    other[:, 2] = (other[:, 2] + 1) % 20
    before, after = net(text, image)[0], net(other, image)[0]
    assert torch.equal(before[:, :3], after[:, :3]) and not torch.equal(before[:, 3:], after[:, 3:])


def test_an_image_logit_sees_every_token_before_its_own_and_all_text() -> None:
    net = model("dense")
    text, image = batch()
    before = net(text, image)[1]
    for slot in range(16):
        other = image.clone()
        other[:, slot] = (other[:, slot] + 1) % 12
        changed = (net(text, other)[1] != before).any(-1)
        assert torch.equal(changed, (torch.arange(16) > slot).expand(2, -1))
    for slot in range(3):
        other = text.clone()
        other[:, slot] = (other[:, slot] + 1) % 20
        assert (net(other, image)[1] != before).any(-1).all()


def test_each_pad_slot_has_a_vector_of_its_own() -> None:
    net = model()
    embedded = net.embed_text(torch.full((1, 5), PAD))[0, 1:]
    assert len(embedded.unique(dim=0)) == 5
    torch.testing.assert_close(embedded, net.text_pad.weight[1:])


def test_slot_0_is_start_of_image_and_any_slots_can_be_embedded_alone() -> None:
    net = model()
    _, image = batch()
    before, slots = F.pad(image[:, :-1], (1, 0)), torch.arange(16)
    every = net.embed_image(before, slots)
    assert torch.equal(net.embed_image(before[:, 5:9], slots[5:9]), every[:, 5:9])
    start = net.starts.weight[1] + net.row.weight[0] + net.column.weight[0]
    assert torch.equal(every[:, 0], start.expand(2, -1))
    assert torch.equal(net.embed_image((before + 1) % 12, slots)[:, 0], every[:, 0])
    want = net.image_token.weight[image[:, 5]] + net.row.weight[1] + net.column.weight[2]
    assert torch.equal(every[:, 6], want)  # slot 6 predicts the token in row 1, column 2


def test_the_head_that_draws_each_code_is_trained_at_its_position() -> None:
    """A released model elsewhere has an image head that its first position never trained."""
    text, image = batch()
    for slot in range(16):
        net = model()
        logits = net(text, image)[1][:, slot]
        F.cross_entropy(logits, image[:, slot]).backward()
        assert net.image_head.weight.grad is not None and net.text_head.weight.grad is None
        assert (net.image_head.weight.grad.abs().sum(-1) > 0).all()
    image_logits = torch.zeros(2, 16, 12, requires_grad=True)
    text_image_loss(torch.zeros(2, 5, 20), image_logits, text, image, 1 / 8, 6).image.backward()
    assert image_logits.grad is not None and (image_logits.grad.abs().sum(-1) > 0).all()


@pytest.mark.parametrize("how", ["cpu", "auto"])
def test_what_computes_attention_changes_no_loss_and_no_gradient(how: How) -> None:
    want, got = loss_and_gradients(model("dense")), loss_and_gradients(model(how))
    for name in want:  # float32 sums in another order, five layers deep
        torch.testing.assert_close(got[name], want[name], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("recompute", ["attention", "resblock"])
@pytest.mark.parametrize("how", ["cpu", "dense"])
def test_recomputing_gives_the_same_bits(how: How, recompute: Recompute, dtype: torch.dtype) -> None:
    want, got = (loss_and_gradients(model(how, choice).to(dtype)) for choice in ("none", recompute))
    assert all(torch.equal(got[name], want[name]) for name in want)


def test_recomputing_keeps_less_for_the_backward_pass() -> None:
    kept = {}
    for recompute in get_args(Recompute):
        total = 0

        def pack(tensor: Tensor) -> Tensor:
            nonlocal total
            total += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            losses(model(recompute=recompute))
        kept[recompute] = total
    assert kept["none"] > kept["attention"] > kept["resblock"]


@pytest.mark.parametrize("recompute", get_args(Recompute))
def test_the_residual_stream_is_float32_under_16_bit_weights(recompute: Recompute) -> None:
    net = model(recompute=recompute).bfloat16()
    seen: list[tuple[torch.dtype, torch.dtype]] = []
    for layer in net.layers:
        for resblock in layer.children():
            resblock.register_forward_hook(lambda _, __, out: seen.append((out[0].dtype, out[1].dtype)))
    losses(net)
    assert seen == [(torch.float32, torch.bfloat16)] * 10
    text, image = batch()
    assert [logits.dtype for logits in net(text, image)] == [torch.float32] * 2


@pytest.mark.skipif(not shutil.which("c++"), reason="torch.compile needs a C++ compiler")
def test_compiled_mlps_agree_with_the_others() -> None:
    want, net = loss_and_gradients(model("cpu")), model("cpu", "attention")
    net.compile_mlps()
    got = loss_and_gradients(net)
    for name in want:
        torch.testing.assert_close(got[name], want[name], atol=1e-5, rtol=1e-4)


def test_losses_are_means_over_their_own_tokens_weighted_an_eighth_to_seven() -> None:
    text, image = batch()
    text_logits, image_logits = torch.randn(2, 5, 20), torch.randn(2, 16, 12)
    losses = text_image_loss(text_logits, image_logits, text, image, 1 / 8, 6)
    words = text != PAD
    want_text = -text_logits.log_softmax(-1)[words].gather(-1, text[words][:, None]).mean()
    want_image = -image_logits.log_softmax(-1).gather(-1, image[..., None]).mean()
    torch.testing.assert_close(losses.text, want_text)
    torch.testing.assert_close(losses.image, want_image)
    torch.testing.assert_close(losses.total, want_text / 8 + want_image * 7 / 8)


def test_the_first_loss_is_that_of_a_uniform_guess() -> None:
    text, image = batch()
    losses = text_image_loss(*Transformer(CONFIG, SIZES)(text, image), text, image, 1 / 8, 6)
    assert losses.image.item() == pytest.approx(torch.tensor(12.0).log().item(), abs=1e-4)


def test_a_batch_of_another_shape_is_refused_with_its_shape() -> None:
    with pytest.raises(ValueError, match=r"\(B, 5\)"):
        model()(torch.zeros(2, 6, dtype=torch.int64), torch.zeros(2, 16, dtype=torch.int64))


def test_the_papers_size_has_the_papers_parameters() -> None:
    config = TransformerConfig(n_text=256, n_layers=64, n_heads=62, d_head=64)
    with torch.device("meta"):
        net = Transformer(config, Sizes(16_384, 8_192, 32))
    matrices = sum(p.numel() for layer in net.layers for p in layer.parameters() if p.ndim == 2)
    assert matrices == 12_092_178_432  # 12 d^2 a layer
