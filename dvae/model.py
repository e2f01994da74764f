"""The discrete VAE's encoder and decoder: pictures <-> logits over the codebook.

Shape after the code released with Ramesh et al. 2021 (encoder.py, decoder.py) and its appendix A.1:
groups of bottleneck residual blocks, max-pooling down, nearest-neighbour up, 1x1 convolutions next
to the relaxation, residual outputs scaled by 1 / n_layers**2.

In 16 bit, every convolution but the two next to the relaxation computes in it, and what lies between
them is kept in it; weights stay fp32 (utils.py casts them in the same places).

Axes: B batch, C channels, K codebook, G grid side, P = image side.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dvae.config import DvaeConfig

N_LIKELIHOOD = 6  # 3 means and 3 log-scales of the logit-Laplace (appendix A.3)


class Conv(nn.Conv2d):
    """A "same" convolution with odd kernel; weights ~ N(0, 1 / (n_in k^2)), biases 0 (utils.py).

    Whatever it is given, it computes and answers in `computes`; its weights are kept as they are.
    """

    def __init__(self, n_in: int, n_out: int, kernel: int, computes: torch.dtype = torch.float32) -> None:
        super().__init__(n_in, n_out, kernel, padding=(kernel - 1) // 2)
        self.computes = computes
        nn.init.normal_(self.weight, std=1 / math.sqrt(n_in * kernel**2))
        nn.init.zeros_(self.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        assert self.bias is not None
        kind = self.computes
        return self._conv_forward(x.to(kind), self.weight.to(kind), self.bias.to(kind))


class Block(nn.Module):
    """skip(x) + gain * residual(x); the residual is four ReLU-conv steps through n_out / 4 channels.

    enlarges: of x with each position repeated 2 x 2 (nearest-neighbour upsampling). Neither 1x1 convolutions nor
    ReLUs look beside their position, so they come before, at a quarter of the work.
    """

    def __init__(
        self,
        n_in: int,
        n_out: int,
        kernels: tuple[int, int, int, int],
        gain: float,
        computes: torch.dtype,
        enlarges: bool = False,
    ) -> None:
        super().__init__()
        assert not enlarges or kernels[0] == 1
        hidden = n_out // 4
        widths = (n_in, hidden, hidden, hidden, n_out)
        self.gain, self.enlarges = gain, enlarges
        self.skip = Conv(n_in, n_out, 1, computes) if n_in != n_out else nn.Identity()
        self.convs = nn.ModuleList(
            Conv(a, b, k, computes) for a, b, k in zip(widths[:-1], widths[1:], kernels, strict=True)
        )

    def forward(self, x: Tensor) -> Tensor:
        first, *others = self.convs
        residual = self._placed(F.relu_(first(F.relu(x))))
        for conv in others[:-1]:
            residual = F.relu_(conv(residual))
        return torch.add(self._placed(self.skip(x)), others[-1](residual), alpha=self.gain)

    def _placed(self, x: Tensor) -> Tensor:
        return F.interpolate(x, scale_factor=2.0, mode="nearest") if self.enlarges else x


class Group(nn.Sequential):
    """Blocks of one resolution. `recompute`: in the backward pass each block is computed again from its input."""

    recompute = False

    def forward(self, x: Tensor) -> Tensor:
        for block in self:
            x = checkpoint(block, x, use_reentrant=False) if self.recompute else block(x)
        return x


class Encoder(nn.Module):
    """(B, 3, P, P) pixels mapped to (0.1, 0.9) -> (B, K, G, G) logits of the codes, float32."""

    def __init__(self, config: DvaeConfig, computes: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.fold = config.fold
        gain = 1 / (config.n_groups * config.n_blocks) ** 2
        self.stem = Conv(3 * config.fold**2, config.width, 7 if config.fold == 1 else 3, computes)
        self.groups = nn.ModuleList()
        n_in = config.width
        for group in range(config.n_groups):
            n_out = config.width * 2**group
            inputs = [n_in, *[n_out] * (config.n_blocks - 1)]
            self.groups.append(Group(*(Block(n, n_out, (3, 3, 3, 1), gain, computes) for n in inputs)))
            n_in = n_out
        self.head = Conv(n_in, config.codebook, 1)

    def features(self, pixels: Tensor) -> Tensor:
        """(B, width * 2**(n_groups-1), G, G): what the head reads."""
        x = self.stem(F.pixel_unshuffle(pixels, self.fold))
        for number, group in enumerate(self.groups):
            x = group(F.max_pool2d(x, 2) if number else x)
        return F.relu(x)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.head(self.features(pixels)).float()


class Decoder(nn.Module):
    """(B, K, G, G) weights over the codes -> (B, 6, P, P): logit-Laplace means and log-scales."""

    def __init__(self, config: DvaeConfig, computes: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.fold = config.fold
        gain = 1 / (config.n_groups * config.n_blocks) ** 2
        self.embed = Conv(config.codebook, config.n_init, 1)
        self.groups = nn.ModuleList()
        n_in = config.n_init
        for group in reversed(range(config.n_groups)):
            n_out = config.width * 2**group
            first = Block(n_in, n_out, (1, 3, 3, 3), gain, computes, enlarges=len(self.groups) > 0)
            others = (Block(n_out, n_out, (1, 3, 3, 3), gain, computes) for _ in range(config.n_blocks - 1))
            self.groups.append(Group(first, *others))
            n_in = n_out
        self.head = Conv(n_in, N_LIKELIHOOD * config.fold**2, 1, computes)

    def forward(self, weights: Tensor) -> Tensor:
        return self._from_embedding(self.embed(weights))

    def of_codes(self, codes: Tensor) -> Tensor:
        """(B, G, G) int64 codes -> (B, 6, P, P): of one-hot weights, by looking up their product."""
        assert self.embed.bias is not None
        embedded = F.embedding(codes, self.embed.weight.flatten(1).t()) + self.embed.bias
        return self._from_embedding(embedded.permute(0, 3, 1, 2))

    def _from_embedding(self, x: Tensor) -> Tensor:
        for group in self.groups:
            x = group(x)
        return F.pixel_shuffle(self.head(F.relu(x)), self.fold).float()


class Dvae(nn.Module):
    """Encoder and decoder with the two uses that other stages have for them."""

    def __init__(
        self, config: DvaeConfig, computes: torch.dtype = torch.float32, recompute_blocks: bool = False
    ) -> None:
        """computes: of all convolutions but the two next to the relaxation. recompute_blocks: activation
        checkpointing; a training step then keeps the inputs of blocks alone, and has the same bits."""
        super().__init__()
        self.config = config
        self.encoder = Encoder(config, computes)
        self.decoder = Decoder(config, computes)
        for module in self.modules():
            if isinstance(module, Group):
                module.recompute = recompute_blocks

    def encode(self, pixels: Tensor) -> Tensor:
        """(B, 3, P, P) mapped pixels -> (B, G, G) int64 codes: argmax of the logits, without noise
        (section 2.2, footnote 6)."""
        side = self.config.image_side
        if pixels.shape[1:] != (3, side, side):
            raise ValueError(f"pixels must be (B, 3, {side}, {side}), not {tuple(pixels.shape)}")
        return self.encoder(pixels).argmax(1)

    def decode(self, codes: Tensor) -> Tensor:
        """(B, G, G) int64 codes -> (B, 6, P, P) likelihood parameters."""
        return self.decoder.of_codes(codes)
