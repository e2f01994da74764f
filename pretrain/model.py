"""The transformer: text and image ids -> logits, and the two losses.

A decoder-only pre-norm transformer over T text slots and I image slots with row, column and conv
attention (Ramesh et al. 2021, section 2.2 and appendix B.1). Activation, initialisation and the
scaling of residual outputs are those of Child et al. 2019 (arXiv 1904.10509), which the paper
builds on. Axis letters: see kernels/layout.py.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data_pipeline.loader import PAD
from kernels.layout import Layout, Sparsity, layer_pattern
from kernels.reference import masked_attention
from pretrain.config import TransformerConfig

INIT = 0.125  # Child et al. 2019, section 5: weights ~ N(0, 0.125 / sqrt(fan in))


@dataclass(frozen=True)
class Sizes:
    """What the data decides of the model's shape."""

    text_vocab: int
    codebook: int
    grid: int


@dataclass(frozen=True)
class Losses:
    """Nats per token."""

    total: Tensor
    text: Tensor
    image: Tensor


class KeyValues:
    """Keys and values of the slots seen so far, one pair of (B, H, S, D) buffers a layer."""

    def __init__(self, config: TransformerConfig, layout: Layout, batch: int, like: Tensor) -> None:
        shape = (config.n_layers, 2, batch, config.n_heads, layout.n_slots, config.d_head)
        self.store = torch.zeros(shape, dtype=like.dtype, device=like.device)
        self.length = 0


class Attention(nn.Module):
    """Multi-head attention under one fixed mask."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        d = config.d_model
        self.n_heads = config.n_heads
        self.qkv = nn.Linear(d, 3 * d)
        self.out = nn.Linear(d, d)

    def forward(self, x: Tensor, mask: Tensor, store: Tensor | None = None, start: int = 0) -> Tensor:
        """x (B, S, M), mask (S, keys) -> (B, S, M). With a store (2, B, H, slots, D), x stands at `start`."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.n_heads, -1)).permute(2, 0, 3, 1, 4)  # each (B, H, S, D)
        if store is not None:
            end = start + x.shape[1]
            store[0, :, :, start:end], store[1, :, :, start:end] = k, v
            k, v = store[0, :, :, :end], store[1, :, :, :end]
        return self.out(masked_attention(q, k, v, mask).transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """M -> 4M -> M with x * sigmoid(1.702 x) (Child et al. 2019, section 5)."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.enter = nn.Linear(config.d_model, 4 * config.d_model)
        self.out = nn.Linear(4 * config.d_model, config.d_model)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        return self.out(x * torch.sigmoid(1.702 * x))


class Layer(nn.Module):
    """An attention resblock and an MLP resblock."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.norm_attention = nn.LayerNorm(config.d_model)
        self.attention = Attention(config)
        self.norm_mlp = nn.LayerNorm(config.d_model)
        self.mlp = Mlp(config)

    def forward(self, x: Tensor, mask: Tensor, store: Tensor | None = None, start: int = 0) -> Tensor:
        x = x + self.attention(self.norm_attention(x), mask, store, start)
        return x + self.mlp(self.norm_mlp(x))


class Transformer(nn.Module):
    """Ids to logits; knows no tokenizer and no sampler."""

    def __init__(self, config: TransformerConfig, sizes: Sizes) -> None:
        super().__init__()
        d = config.d_model
        self.config, self.sizes = config, sizes
        self.layout = Layout(config.n_text, sizes.grid, sizes.grid)
        self.text_token = nn.Embedding(sizes.text_vocab, d)
        self.text_position = nn.Embedding(config.n_text, d)
        self.text_pad = nn.Embedding(config.n_text, d)  # one learned pad vector per position (section 2.2)
        self.image_token = nn.Embedding(sizes.codebook, d)
        self.row = nn.Embedding(sizes.grid, d)
        self.column = nn.Embedding(sizes.grid, d)
        self.starts = nn.Embedding(2, d)  # start-of-text, start-of-image
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.n_layers))
        self.norm = nn.LayerNorm(d)
        self.text_head = nn.Linear(d, sizes.text_vocab)
        self.image_head = nn.Linear(d, sizes.codebook)
        patterns = [layer_pattern(number, config.n_layers) for number in range(1, config.n_layers + 1)]
        self.patterns = patterns
        for pattern in sorted(set(patterns)):
            mask = Sparsity(pattern, self.layout, config.conv_kernel).mask()
            self.register_buffer(f"mask_{pattern}", mask, persistent=False)
        self._initialise()

    def _initialise(self) -> None:
        residual_scale = 1 / math.sqrt(2 * self.config.n_layers)
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                std = INIT / math.sqrt(module.in_features)
                nn.init.normal_(module.weight, std=std * (residual_scale if name.endswith(".out") else 1))
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=INIT / math.sqrt(module.embedding_dim))
        nn.init.zeros_(self.text_head.weight)
        nn.init.zeros_(self.image_head.weight)

    def embed_text(self, text: Tensor) -> Tensor:
        """(B, T-1) ids with PAD -> (B, T, M): start-of-text, tokens with positions, pad vectors."""
        slots = torch.arange(1, self.config.n_text, device=text.device)
        token = self.text_token(text.clamp(min=0)) + self.text_position(slots)
        words = torch.where((text == PAD)[..., None], self.text_pad(slots), token)
        start = self.starts.weight[0] + self.text_position.weight[0]
        return torch.cat([start.expand(len(text), 1, -1), words], 1)

    def embed_image(self, image: Tensor, first: int = 0) -> Tensor:
        """Image slots first .. first + n - 1 -> (B, n, M). `image` (B, n) holds the token *before*
        each slot; slot 0 has none and is start-of-image. Row and column are those of the token that
        the slot predicts (figure 10)."""
        slots = torch.arange(first, first + image.shape[1], device=image.device)
        token = self.image_token(image)
        if first == 0:
            start = self.starts.weight[1].expand(len(image), 1, -1)
            token = torch.cat([start, token[:, 1:]], 1)
        grid = self.sizes.grid
        return token + self.row(slots.div(grid, rounding_mode="floor")) + self.column(slots % grid)

    def mask(self, pattern: str) -> Tensor:
        """(S, S) bool mask of a pattern."""
        return self.get_buffer(f"mask_{pattern}")

    def hidden(self, x: Tensor, cache: KeyValues | None = None) -> Tensor:
        """Embedded slots (B, n, M) -> (B, n, M) before the heads. With a cache, they follow its slots."""
        start = cache.length if cache else 0
        end = start + x.shape[1]
        for number, (layer, pattern) in enumerate(zip(self.layers, self.patterns, strict=True)):
            mask = self.mask(pattern)[start:end, :end]
            x = layer(x, mask, cache.store[number] if cache else None, start)
        if cache:
            cache.length = end
        return self.norm(x)

    def forward(self, text: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
        """text (B, T-1), image (B, I) -> float32 logits (B, T-1, V) of the text, (B, I, K) of the image."""
        self._check(text, image)
        previous = F.pad(image[:, :-1], (1, 0))
        x = self.hidden(torch.cat([self.embed_text(text), self.embed_image(previous)], 1))
        x_text, x_image = x[:, : self.config.n_text - 1], x[:, self.config.n_text :]
        return self.text_head(x_text).float(), self.image_head(x_image).float()

    def _check(self, text: Tensor, image: Tensor) -> None:
        want = (self.config.n_text - 1, self.layout.n_image)
        if (text.shape[1], image.shape[1]) != want or len(text) != len(image):
            raise ValueError(f"text (B, {want[0]}) and image (B, {want[1]}), not {text.shape} and {image.shape}")


def text_image_loss(
    text_logits: Tensor, image_logits: Tensor, text: Tensor, image: Tensor, weight: float, n_words: float
) -> Losses:
    """Next-token losses of text and image, each a mean over its own tokens, weighted apart.

    text_logits (B, T-1, V), image_logits (B, I, K), text (B, T-1), image (B, I). Pads are no targets.
    n_words: what the sum over text tokens is divided by. Captions differ in length between ranks, so
    for the mean over ranks to be the mean over the batch it is the batch's tokens per rank.
    total = weight * text + (1 - weight) * image; the paper's weight is 1/8 (section 2.2).
    """
    text_nats = F.cross_entropy(text_logits.flatten(0, 1), text.flatten(), ignore_index=PAD, reduction="sum") / n_words
    image_nats = F.cross_entropy(image_logits.flatten(0, 1), image.flatten())
    return Losses(weight * text_nats + (1 - weight) * image_nats, text_nats, image_nats)
