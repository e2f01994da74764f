"""Stand-ins for the modules of the PyPI package `dall-e`: same class paths, attributes and names, any size.

Written from the structure that the released code documents, so that tests need neither the package
nor its weights. `published_classes` puts them under the package's names while files are written.
"""

import math
import sys
from collections import OrderedDict
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

LOUD = 4.0  # weights of residual paths, so that they count beside the skips despite the gain of 1/64


class Conv2d(nn.Module):
    def __init__(self, n_in: int, n_out: int, kernel: int, gain: float = 1.0) -> None:
        super().__init__()
        self.n_in, self.n_out, self.kw, self.use_float16 = n_in, n_out, kernel, True
        self.device = torch.device("cpu")
        self.w = nn.Parameter(gain * torch.randn(n_out, n_in, kernel, kernel) / math.sqrt(n_in * kernel**2))
        self.b = nn.Parameter(0.1 * torch.randn(n_out))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.w, self.b, padding=self.kw // 2)


class Block(nn.Module):
    kernels = (3, 3, 3, 1)

    def __init__(self, n_in: int, n_out: int, n_layers: int) -> None:
        super().__init__()
        self.n_in, self.n_out, self.n_layers, self.post_gain = n_in, n_out, n_layers, 1 / n_layers**2
        widths = (n_in, *3 * (n_out // 4,), n_out)
        self.id_path = nn.Identity() if n_in == n_out else Conv2d(n_in, n_out, 1)
        self.res_path = nn.Sequential()
        for i, kernel in enumerate(self.kernels, 1):
            self.res_path.add_module(f"relu_{i}", nn.ReLU())
            self.res_path.add_module(f"conv_{i}", Conv2d(widths[i - 1], widths[i], kernel, LOUD))

    def forward(self, x: Tensor) -> Tensor:
        return self.id_path(x) + self.post_gain * self.res_path(x)


class EncoderBlock(Block):
    pass


class DecoderBlock(Block):
    kernels = (1, 3, 3, 3)


class Encoder(nn.Module):
    def __init__(self, n_hid: int, vocab_size: int, n_blk_per_group: int = 2) -> None:
        super().__init__()
        widths = [n_hid * m for m in (1, 1, 2, 4, 8)]
        parts: list[tuple[str, nn.Module]] = [("input", Conv2d(3, n_hid, 7))]
        parts += groups(EncoderBlock, widths, n_blk_per_group, ("pool", nn.MaxPool2d(kernel_size=2)))
        self.blocks = nn.Sequential(OrderedDict([*parts, ("output", output(widths[-1], vocab_size))]))

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x)


class Decoder(nn.Module):
    def __init__(self, n_hid: int, vocab_size: int, n_init: int = 16, n_blk_per_group: int = 2) -> None:
        super().__init__()
        widths = [n_init, *(n_hid * m for m in (8, 4, 2, 1))]
        parts: list[tuple[str, nn.Module]] = [("input", Conv2d(vocab_size, n_init, 1, math.sqrt(vocab_size)))]
        parts += groups(DecoderBlock, widths, n_blk_per_group, ("upsample", nn.Upsample(scale_factor=2)))
        self.blocks = nn.Sequential(OrderedDict([*parts, ("output", output(n_hid, 6))]))

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x)


def groups(
    block: type[Block], widths: list[int], n_blocks: int, between: tuple[str, nn.Module]
) -> list[tuple[str, nn.Module]]:
    made: list[tuple[str, nn.Module]] = []
    for number in range(1, 5):
        n_in, n_out = widths[number - 1], widths[number]
        parts: list[tuple[str, nn.Module]] = [
            (f"block_{i + 1}", block(n_out if i else n_in, n_out, 4 * n_blocks)) for i in range(n_blocks)
        ]
        made.append((f"group_{number}", nn.Sequential(OrderedDict(parts + [between] * (number < 4)))))
    return made


def output(n_in: int, n_out: int) -> nn.Module:
    return nn.Sequential(OrderedDict([("relu", nn.ReLU()), ("conv", Conv2d(n_in, n_out, 1))]))


PLACES = {
    "dall_e.utils": (Conv2d,), "dall_e.encoder": (Encoder, EncoderBlock), "dall_e.decoder": (Decoder, DecoderBlock),
}  # fmt: skip


def published_classes(patch: pytest.MonkeyPatch) -> None:
    """Let pickle find the stand-ins as classes of dall_e, for as long as the patch holds."""
    patch.setitem(sys.modules, "dall_e", ModuleType("dall_e"))
    for place, classes in PLACES.items():
        module = ModuleType(place)
        for one in classes:
            patch.setattr(one, "__module__", place)
            setattr(module, one.__name__, one)
        patch.setitem(sys.modules, place, module)
