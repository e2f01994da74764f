"""The transformer: text and image ids -> logits, and the two losses.

A decoder-only pre-norm transformer over T text slots and I image slots with row, column and conv
attention (Ramesh et al. 2021, section 2.2 and appendix B.1). Activation, initialisation and the
scaling of residual outputs are those of Child et al. 2019 (arXiv 1904.10509), which the paper
builds on. Axis letters: see kernels/layout.py.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from data_pipeline.loader import PAD
from kernels.attention import How, attention
from kernels.boundary import boundary, leave
from kernels.layout import Layout, Sparsity, layer_pattern
from kernels.linear import activated_linear, linear, packed
from pretrain.config import TransformerConfig

INIT = 0.125  # Child et al. 2019, section 5: weights ~ N(0, 0.125 / sqrt(fan in))

Attend = Callable[[Tensor], Tensor]  # packed queries, keys and values (..., 3, H, D) -> (..., H, D)
Recompute = Literal["none", "attention", "resblock"]


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


class Linear(nn.Linear):
    """A linear layer through the door of kernels/linear.py."""

    packed: Tensor | None = None

    def pack(self) -> None:
        """Keep the weights only as products with few rows read them fastest: for drawing, not for training."""
        self.packed = packed(self.weight)
        self.register_parameter("weight", None)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight if self.packed is None else self.packed, self.bias)


class ActivatedLinear(Linear):
    """x * sigmoid(1.702 x), then the linear layer."""

    def forward(self, x: Tensor) -> Tensor:
        return activated_linear(x, self.weight if self.packed is None else self.packed, self.bias)


class Attention(nn.Module):
    """Multi-head attention; who may look at whom is `attend`'s affair."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        d = config.d_model
        self.n_heads = config.n_heads
        self.qkv = Linear(d, 3 * d)
        self.out = Linear(d, d)

    def forward(self, h: Tensor, attend: Attend) -> Tensor:
        """h (..., M) -> (..., M)."""
        return self.out(attend(self.qkv(h).unflatten(-1, (3, self.n_heads, -1))).flatten(-2))


class Mlp(nn.Module):
    """M -> 4M -> M with x * sigmoid(1.702 x) between (Child et al. 2019, section 5)."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.enter = Linear(config.d_model, 4 * config.d_model)
        self.out = ActivatedLinear(4 * config.d_model, config.d_model)

    def forward(self, h: Tensor) -> Tensor:
        """h (..., M) -> (..., M)."""
        return self.out(self.enter(h))


class Norm(nn.Module):
    """Adds a branch to the stream and normalises the sum, in one pass."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor, branch: Tensor | None) -> tuple[Tensor, Tensor]:
        """x + branch, and its layer norm in the dtype of the weights."""
        return boundary(x, branch, self.gain, self.bias, dtype=self.gain.dtype)


class Resblock(nn.Module):
    """Joins the branch of the resblock before to the stream and computes its own."""

    def __init__(self, width: int, inner: nn.Module) -> None:
        super().__init__()
        self.norm = Norm(width)
        self.inner = inner

    def forward(self, x: Tensor, branch: Tensor | None, *attend: Attend) -> tuple[Tensor, Tensor]:
        """Stream x (..., M) float32 and a branch (..., M) still to be added -> the same of this resblock."""
        x, h = self.norm(x, branch)
        return x, self.inner(h, *attend)

    def recomputed(self, x: Tensor, branch: Tensor | None, *attend: Attend) -> tuple[Tensor, Tensor]:
        """The same, but only the stream is kept for the backward pass, which computes the rest again."""
        x = x if branch is None else leave(x, branch)
        return checkpoint(self, x, None, *attend, use_reentrant=False, preserve_rng_state=False)


class Layer(nn.Module):
    """An attention resblock and an MLP resblock."""

    def __init__(self, config: TransformerConfig, recompute: Recompute = "none") -> None:
        super().__init__()
        self.attention = Resblock(config.d_model, Attention(config))
        self.mlp = Resblock(config.d_model, Mlp(config))
        self.recompute = recompute

    def forward(self, x: Tensor, branch: Tensor | None, attend: Attend) -> tuple[Tensor, Tensor]:
        attention = self.attention.recomputed if self._forgets("attention", "resblock") else self.attention
        mlp = self.mlp.recomputed if self._forgets("resblock") else self.mlp
        return mlp(*attention(x, branch, attend))

    def _forgets(self, *choices: Recompute) -> bool:
        return self.recompute in choices and torch.is_grad_enabled()


class Transformer(nn.Module):
    """Ids to logits; knows no tokenizer and no sampler."""

    def __init__(
        self, config: TransformerConfig, sizes: Sizes, how: How = "auto", recompute: Recompute = "none"
    ) -> None:
        """how: what computes attention (kernels/attention.py). recompute: which resblocks the backward pass
        computes again instead of keeping their activations. Neither changes the result."""
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
        self.layers = nn.ModuleList(Layer(config, recompute) for _ in range(config.n_layers))
        self.norm = Norm(d)
        self.text_head = Linear(d, sizes.text_vocab)
        self.image_head = Linear(d, sizes.codebook)
        self.attends = [partial(attention, sparsity=sparsity, how=how) for sparsity in self.sparsities(self.layout)]
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

    def embed_image(self, before: Tensor, slots: Tensor) -> Tensor:
        """Image slots `slots` (n,) -> (B, n, M). `before` (B, n) holds the token before each slot; slot 0 has
        none and is start-of-image. Row and column are those of the token that the slot predicts (figure 10)."""
        token = torch.where(slots[:, None] == 0, self.starts.weight[1], self.image_token(before))
        grid = self.sizes.grid
        return token + self.row(slots.div(grid, rounding_mode="floor")) + self.column(slots % grid)

    def pack(self) -> "Transformer":
        """Make it draw faster; it can no longer train."""
        for module in self.modules():
            if isinstance(module, Linear):
                module.pack()
        return self

    def compile_mlps(self) -> None:
        """torch.compile the MLP resblocks, whose activation it fuses; elsewhere kernels leave nothing to fuse."""
        for layer in self.layers:
            layer.get_submodule("mlp").compile()

    def sparsities(self, layout: Layout) -> list[Sparsity]:
        """Who may look at whom in each layer, over the slots of `layout`."""
        n, kernel, half = self.config.n_layers, self.config.conv_kernel, self.config.conv_half_window
        return [Sparsity(layer_pattern(number, n), layout, kernel, half) for number in range(1, n + 1)]

    def hidden(self, x: Tensor, attends: Sequence[Attend]) -> Tensor:
        """Embedded slots (..., M) -> (..., M) before the heads. The residual stream is float32 (appendix D)."""
        x, branch = x.float(), None
        for layer, attend in zip(self.layers, attends, strict=True):
            x, branch = layer(x, branch, attend)
        return self.norm(x, branch)[1]

    def forward(self, text: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
        """text (B, T-1), image (B, I) -> float32 logits (B, T-1, V) of the text, (B, I, K) of the image."""
        self._check(text, image)
        slots = torch.arange(image.shape[1], device=image.device)
        embedded = [self.embed_text(text), self.embed_image(F.pad(image[:, :-1], (1, 0)), slots)]
        x = self.hidden(torch.cat(embedded, 1), self.attends)
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
