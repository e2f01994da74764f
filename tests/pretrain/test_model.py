"""What each logit may and must depend on, and that the cached pass is the full pass."""

import pytest
import torch
from torch import Tensor

from data_pipeline.loader import PAD
from kernels.layout import Sparsity, layer_pattern
from pretrain.config import TransformerConfig
from pretrain.model import KeyValues, Sizes, Transformer, text_image_loss

CONFIG = TransformerConfig(n_text=6, n_layers=5, n_heads=2, d_head=8, conv_kernel=3)
SIZES = Sizes(text_vocab=20, codebook=12, grid=4)


def model(config: TransformerConfig = CONFIG) -> Transformer:
    torch.manual_seed(0)
    made = Transformer(config, SIZES).double()
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


def test_each_image_logit_sees_all_of_the_promised_past_and_no_future() -> None:
    net = model()
    text, image = batch(1)
    slots = torch.cat([net.embed_text(text), net.embed_image(torch.nn.functional.pad(image[:, :-1], (1, 0)))], 1)
    slots = slots.detach().requires_grad_()
    hidden = net.hidden(slots)
    depends = torch.stack(
        [
            torch.autograd.grad(hidden[0, 6 + i].sum(), slots, retain_graph=True)[0][0].abs().sum(-1) > 0
            for i in range(16)
        ]
    )
    assert torch.equal(depends, reach())
    assert torch.equal(depends, torch.ones(16, 22).tril(6).bool())  # at this depth: the whole past


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


def test_each_pad_slot_has_a_vector_of_its_own() -> None:
    net = model()
    embedded = net.embed_text(torch.full((1, 5), PAD))[0, 1:]
    assert len(embedded.unique(dim=0)) == 5
    torch.testing.assert_close(embedded, net.text_pad.weight[1:])


def test_the_cached_pass_gives_the_full_pass_logits() -> None:
    net = model()
    text, image = batch()
    want = net(text, image)[1]
    cache = KeyValues(CONFIG, net.layout, len(text), net.row.weight)
    net.hidden(net.embed_text(text), cache)
    for slot in range(16):
        before = image[:, max(slot - 1, 0) : max(slot, 1)]
        logits = net.image_head(net.hidden(net.embed_image(before, first=slot), cache)[:, 0]).float()
        torch.testing.assert_close(logits, want[:, slot], atol=1e-5, rtol=1e-5)


def test_the_head_that_draws_the_first_code_is_trained() -> None:
    net = model()
    text, image = batch()
    image_logits = net(text, image)[1]
    image_logits.retain_grad()
    text_image_loss(net(text, image)[0], image_logits, text, image, 0.125, 6).image.backward()
    assert image_logits.grad is not None
    assert (image_logits.grad.abs().sum(-1) > 0).all()


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
