"""The discrete VAE's encoder and decoder: pictures <-> logits over the codebook.

Shape after the code released with Ramesh et al. 2021 (encoder.py, decoder.py) and its appendix A.1:
groups of bottleneck residual blocks, max-pooling down, nearest-neighbour up, 1x1 convolutions next
to the relaxation, residual outputs scaled by 1 / n_layers**2.

Axes: B batch, C channels, K codebook, G grid side, P = image side.
"""

import math

import torch.nn.functional as F
from torch import Tensor, nn

from dvae.config import DvaeConfig

N_LIKELIHOOD = 6  # 3 means and 3 log-scales of the logit-Laplace (appendix A.3)


class Conv(nn.Conv2d):
    """A "same" convolution with odd kernel; weights ~ N(0, 1 / (n_in k^2)), biases 0 (utils.py)."""

    def __init__(self, n_in: int, n_out: int, kernel: int) -> None:
        super().__init__(n_in, n_out, kernel, padding=(kernel - 1) // 2)
        nn.init.normal_(self.weight, std=1 / math.sqrt(n_in * kernel**2))
        nn.init.zeros_(self.bias)  # type: ignore[arg-type]


class Block(nn.Module):
    """skip(x) + gain * residual(x); the residual is four ReLU-conv steps through n_out / 4 channels."""

    def __init__(self, n_in: int, n_out: int, kernels: tuple[int, int, int, int], gain: float) -> None:
        super().__init__()
        hidden = n_out // 4
        widths = (n_in, hidden, hidden, hidden, n_out)
        self.gain = gain
        self.skip = Conv(n_in, n_out, 1) if n_in != n_out else nn.Identity()
        self.convs = nn.ModuleList(Conv(a, b, k) for a, b, k in zip(widths[:-1], widths[1:], kernels, strict=True))

    def forward(self, x: Tensor) -> Tensor:
        residual = x
        for conv in self.convs:
            residual = conv(F.relu(residual))
        return self.skip(x) + self.gain * residual


class Encoder(nn.Module):
    """(B, 3, P, P) pixels mapped to (0.1, 0.9) -> (B, K, G, G) logits of the codes, float32."""

    def __init__(self, config: DvaeConfig) -> None:
        super().__init__()
        self.fold = config.fold
        gain = 1 / (config.n_groups * config.n_blocks) ** 2
        self.stem = Conv(3 * config.fold**2, config.width, 7 if config.fold == 1 else 3)
        self.groups = nn.ModuleList()
        n_in = config.width
        for group in range(config.n_groups):
            n_out = config.width * 2**group
            blocks = [Block(n_in if b == 0 else n_out, n_out, (3, 3, 3, 1), gain) for b in range(config.n_blocks)]
            self.groups.append(nn.Sequential(*blocks))
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

    def __init__(self, config: DvaeConfig) -> None:
        super().__init__()
        self.fold = config.fold
        gain = 1 / (config.n_groups * config.n_blocks) ** 2
        self.embed = Conv(config.codebook, config.n_init, 1)
        self.groups = nn.ModuleList()
        n_in = config.n_init
        for group in reversed(range(config.n_groups)):
            n_out = config.width * 2**group
            blocks = [Block(n_in if b == 0 else n_out, n_out, (1, 3, 3, 3), gain) for b in range(config.n_blocks)]
            self.groups.append(nn.Sequential(*blocks))
            n_in = n_out
        self.head = Conv(n_in, N_LIKELIHOOD * config.fold**2, 1)

    def forward(self, weights: Tensor) -> Tensor:
        return self.from_embedding(self.embed(weights))

    def from_embedding(self, x: Tensor) -> Tensor:
        """(B, n_init, G, G) embedded codes -> (B, 6, P, P)."""
        for number, group in enumerate(self.groups):
            x = group(F.interpolate(x, scale_factor=2.0, mode="nearest") if number else x)
        return F.pixel_shuffle(self.head(F.relu(x)), self.fold).float()


class Dvae(nn.Module):
    """Encoder and decoder with the two uses that other stages have for them."""

    def __init__(self, config: DvaeConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)

    def encode(self, pixels: Tensor) -> Tensor:
        """(B, 3, P, P) mapped pixels -> (B, G, G) int64 codes: argmax of the logits, without noise
        (section 2.2, footnote 6)."""
        side = self.config.image_side
        if pixels.shape[1:] != (3, side, side):
            raise ValueError(f"pixels must be (B, 3, {side}, {side}), not {tuple(pixels.shape)}")
        return self.encoder(pixels).argmax(1)

    def decode(self, codes: Tensor) -> Tensor:
        """(B, G, G) int64 codes -> (B, 6, P, P) likelihood parameters."""
        one_hot = F.one_hot(codes, self.config.codebook).permute(0, 3, 1, 2)
        return self.decoder(one_hot.to(self.decoder.embed.weight.dtype))
