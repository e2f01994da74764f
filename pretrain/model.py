"""The transformer: text and image ids -> logits, and the two losses.

A decoder-only pre-norm transformer over T text slots and I image slots with row, column and conv
attention (Ramesh et al. 2021, section 2.2 and appendix B.1). Activation, initialisation and the
scaling of residual outputs are those of Child et al. 2019 (arXiv 1904.10509), which the paper
builds on. Axis letters: see kernels/layout.py.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu
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
Whole = Callable[[list[Tensor]], AbstractContextManager[Any]]


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
    """x * sigmoid(1.702 x), then the linear layer.

    Its weight is (inputs, outputs): shards of it, which are runs of rows, are then more nearly square, and cost
    PowerSGD less, for an MLP's second layer has four times as many inputs (Ramesh et al. 2021, table 2).
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.weight = nn.Parameter(self.weight.detach().t().contiguous())

    def pack(self) -> None:
        self.packed = packed(self.weight.t())
        self.register_parameter("weight", None)

    def forward(self, x: Tensor) -> Tensor:
        return activated_linear(x, self.weight.t() if self.packed is None else self.packed, self.bias)


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

    leave_scale: Tensor | None = None  # gradient scale of the branch that joins here
    enter_scale: Tensor | None = None  # and of the one that starts here
    dtype: torch.dtype | None = None  # of the branch that starts here; None is that of the weights

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor, branch: Tensor | None) -> tuple[Tensor, Tensor]:
        """x + branch, and its layer norm."""
        leave_scale = None if branch is None else self.leave_scale
        return boundary(x, branch, self.gain, self.bias, leave_scale, self.enter_scale, self.dtype or self.gain.dtype)


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

    def recomputed(
        self, x: Tensor, branch: Tensor | None, *attend: Attend, on_cpu: bool = False
    ) -> tuple[Tensor, Tensor]:
        """The same, but only the stream is kept for the backward pass, which computes the rest again.

        on_cpu: kept in host memory.
        """
        x = x if branch is None else leave(x, branch, self.norm.leave_scale)
        with save_on_cpu(pin_memory=x.is_cuda) if on_cpu else nullcontext():
            return checkpoint(self, x, None, *attend, use_reentrant=False, preserve_rng_state=False)


class Layer(nn.Module):
    """An attention resblock and an MLP resblock."""

    def __init__(self, config: TransformerConfig, recompute: Recompute = "none", on_cpu: bool = False) -> None:
        super().__init__()
        self.attention = Resblock(config.d_model, Attention(config))
        self.mlp = Resblock(config.d_model, Mlp(config))
        self.recompute, self.on_cpu = recompute, on_cpu

    def forward(self, x: Tensor, branch: Tensor | None, attend: Attend) -> tuple[Tensor, Tensor]:
        attention = self._run(self.attention, "attention", "resblock")
        return self._run(self.mlp, "resblock")(*attention(x, branch, attend))

    def _run(self, block: Resblock, *choices: Recompute) -> Callable[..., tuple[Tensor, Tensor]]:
        if self.recompute in choices and torch.is_grad_enabled():
            return partial(block.recomputed, on_cpu=self.on_cpu)
        return block


class Transformer(nn.Module):
    """Ids to logits; knows no tokenizer and no sampler."""

    def __init__(
        self,
        config: TransformerConfig,
        sizes: Sizes,
        how: How = "auto",
        recompute: Recompute = "none",
        on_cpu: bool = False,
        whole: Whole = nullcontext,
    ) -> None:
        """how: what computes attention (kernels/attention.py). recompute: which resblocks the backward pass
        computes again instead of keeping their activations; on_cpu: what it keeps waits in host memory. None
        changes the result. whole(parameters): the context in which parameters can be set that are sharded as
        they are made."""
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
        self.layers = nn.ModuleList(Layer(config, recompute, on_cpu) for _ in range(config.n_layers))
        self.norm = Norm(d)
        self.text_head = Linear(d, sizes.text_vocab)
        self.image_head = Linear(d, sizes.codebook)
        self.attends = [partial(attention, sparsity=sparsity, how=how) for sparsity in self.sparsities(self.layout)]
        self._initialise(whole)

    def _initialise(self, whole: Whole) -> None:
        residual_scale = 1 / math.sqrt(2 * self.config.n_layers)
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                std = INIT / math.sqrt(module.in_features)
                with whole([module.weight]):
                    nn.init.normal_(module.weight, std=std * (residual_scale if name.endswith(".out") else 1))
            elif isinstance(module, nn.Embedding):
                with whole([module.weight]):
                    nn.init.normal_(module.weight, std=INIT / math.sqrt(module.embedding_dim))
        zeros = [module.bias for module in self.modules() if isinstance(module, nn.Linear)]
        with whole([*zeros, self.text_head.weight, self.image_head.weight]):
            for parameter in (*zeros, self.text_head.weight, self.image_head.weight):
                nn.init.zeros_(parameter)

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

    def resblocks(self) -> dict[str, Resblock]:
        """The 2 L resblocks in the order of the stream, by their names (`layers.0.attention`)."""
        return {name: module for name, module in self.named_modules() if isinstance(module, Resblock)}

    def scale_gradients(self, scales: Tensor) -> None:
        """Compute each resblock's branch in float16, its gradients multiplied by the resblock's own scale.

        scales (2 L,) float32 on the model's device, read anew in every backward pass (Ramesh et al. 2021,
        figure 4). Weights stay float32; so do embeddings, heads, gains and biases and their gradients.
        """
        norms = [block.norm for block in self.resblocks().values()]
        for norm, scale in zip(norms, scales, strict=True):
            norm.enter_scale, norm.dtype = scale, torch.float16
        for norm, scale in zip([*norms[1:], self.norm], scales, strict=True):
            norm.leave_scale = scale

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
