"""How to call rudalle 1.1.3: `python -m benchmarks.peer_rudalle step|memory|sample COUNT`.

DalleModel with its own defaults: its row, column and 11 x 11 convolution masks, one mask product per layer, no sandwich
norms, no PB-relax. Dropout is off, as it is in smalti.
"""

import importlib
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from benchmarks.timing import (
    CODEBOOK,
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

NOT_USED = ("torchvision", "taming.modules.diffusionmodules.model", "youtokentome", "pywt", "matplotlib.pyplot")


def build(training: bool) -> nn.Module:
    """Its DalleModel, the same for training and for sampling."""
    hollow_out(*NOT_USED)
    return importlib.import_module("rudalle.dalle.model").DalleModel(
        device="cpu",
        num_layers=N_LAYERS,
        vocab_size=TEXT_VOCAB + N_TEXT,  # it keeps a padding word for each text slot inside the vocabulary
        hidden_size=D_MODEL,
        num_attention_heads=N_HEADS,
        embedding_dropout_prob=0.0,
        attention_dropout_prob=0.0,
        output_dropout_prob=0.0,
        text_seq_length=N_TEXT,
        image_tokens_per_dim=GRID,
        image_vocab_size=CODEBOOK,
    )


def loss(model: nn.Module, text: Tensor, image: Tensor) -> Tensor:
    sequence = torch.cat((text, image), dim=1)
    causal = torch.ones(len(text), 1, sequence.shape[1], sequence.shape[1]).tril()
    return model(sequence, causal, return_loss=True)[0]


def generate(model: nn.Module, text: Tensor, image: Tensor) -> None:
    """Its generate_images with its cache, the first rows given as an image prompt, filters as in its README."""
    tokenizer = SimpleNamespace(encode_text=lambda *_, **__: text[0])
    prompt = SimpleNamespace(image_prompts_idx=range(PREFIX), image_prompts=image[:1])
    n_images = len(text)
    importlib.import_module("rudalle.pipelines").generate_images(
        "", tokenizer, model, None, top_k=2048, top_p=0.995, images_num=n_images, image_prompts=prompt, bs=n_images
    )


if __name__ == "__main__":
    measure(Peer(build, loss, {"sample": generate}))
