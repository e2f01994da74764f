"""How to call dalle-pytorch 1.6.6: `python -m benchmarks.peer_dalle_pytorch step|memory|sample|sample-cached COUNT`.

Its own defaults (rotary embeddings, token shift, GEGLU) and the layer order of the paper (DALL-E, appendix B.1): column
if (i - 2) mod 4 = 0 for layer i from 1, the last a convolution, else row. Its row layer sees its own row only, its
convolution is 5 x 5. For sampling the row and column layers are its masked full ones, which alone can be cached.
"""

import importlib
from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.timing import (
    CODEBOOK,
    D_HEAD,
    D_MODEL,
    GRID,
    N_HEADS,
    N_LAYERS,
    N_TEXT,
    PREFIX,
    TEXT_VOCAB,
    Peer,
    hollow_out,
    measure,
)

LAYER_TYPES = tuple("axial_col" if i % 4 == 2 else "axial_row" for i in range(1, N_LAYERS)) + ("conv_like",)


def build(training: bool) -> nn.Module:
    """Its DALLE, with the smallest discrete VAE it takes: the VAE only says how many codes there are."""
    hollow_out("taming.models.vqgan", "torchvision")
    peer = importlib.import_module("dalle_pytorch")
    vae = peer.DiscreteVAE(image_size=2 * GRID, num_layers=1, num_tokens=CODEBOOK, codebook_dim=1, hidden_dim=1)
    return peer.DALLE(
        dim=D_MODEL,
        vae=vae,
        num_text_tokens=TEXT_VOCAB,
        text_seq_len=N_TEXT,
        depth=N_LAYERS,
        heads=N_HEADS,
        dim_head=D_HEAD,
        attn_types=LAYER_TYPES,
        optimize_for_inference=not training,
    )


def loss(model: nn.Module, text: Tensor, image: Tensor) -> Tensor:
    return model(text, image, return_loss=True)


def generate(model: nn.Module, text: Tensor, image: Tensor) -> None:
    """Its generate_images, told to use its cache, which it does not do where the guidance scale is 1 (the default)."""
    picture = torch.zeros(len(image), 3, 2 * GRID, 2 * GRID)
    draw: Callable[..., object] = model.generate_images  # type: ignore[assignment]
    draw(text, img=picture, num_init_img_tokens=PREFIX, use_cache=True)


def draw_with_its_cache(model: nn.Module, text: Tensor, image: Tensor) -> None:
    """What its cache can do where forward is called by hand: softmax sampling without a filter."""
    cache: dict[object, object] = {}
    while True:
        logits = model(text, image, cache=cache)[:, -1, -CODEBOOK:]
        image = torch.cat((image, torch.multinomial(logits.softmax(-1), 1)), dim=1)


if __name__ == "__main__":
    measure(Peer(build, loss, {"sample": generate, "sample-cached": draw_with_its_cache}))
