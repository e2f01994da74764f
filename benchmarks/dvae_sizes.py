"""What a step of the discrete VAE costs at the published size, ours and the published modules': for benchmarks/dvae.py.

`python -m benchmarks.dvae_sizes codes|memory|gpu SIZE` prints one JSON object. The published modules are those of
the PyPI package `dall-e` where it is installed (`pip install --no-deps dall-e`, and attrs and requests), else the plain
of tests/dvae/published.py, which are the same arithmetic.
"""

import argparse
import importlib
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.utils.flop_counter import FlopCounterMode

from dvae.config import DvaeConfig
from dvae.likelihood import map_pixels, most_likely_pixels
from dvae.model import Block, Dvae
from dvae.objective import Objective
from dvae.openai import published_name
from tests.dvae import published

SIZES = {
    "published": DvaeConfig(image_side=256, fold=1, width=256, n_groups=4, n_blocks=2, n_init=128, codebook=8192),
    "small": DvaeConfig(image_side=64, fold=1, width=32, n_groups=4, n_blocks=2, n_init=32, codebook=1024),
    "tiny": DvaeConfig(image_side=32, fold=1, width=16, n_groups=4, n_blocks=2, n_init=16, codebook=64),
}
TAU, BETA, FLOOR = 0.5, 6.6, -20.0
LOUD = 4.0  # residual paths, so that they count beside the skips in spite of the gain of 1/64
MEMORY_BATCH, GPU_BATCH = 8, 16
CPU = torch.device("cpu")


class Published(nn.Module):
    """The published encoder and decoder of a shape, as a model that `Objective` takes."""

    def __init__(self, config: DvaeConfig) -> None:
        super().__init__()
        try:
            package: Any = importlib.import_module("dall_e")
            self.source = "the dall-e package"
        except ImportError:
            package, self.source = published, "plain layers of the published shape (no dall-e package here)"
        self.config = config
        self.encoder = package.Encoder(config.width, vocab_size=config.codebook)
        self.decoder = package.Decoder(n_hid=config.width, vocab_size=config.codebook, n_init=config.n_init)
        self.requires_grad_(True)

    @torch.no_grad()
    def take_weights(self, ours: Dvae) -> None:
        for part in ("encoder", "decoder"):
            theirs = dict(getattr(self, part).named_parameters())
            for name, weight in getattr(ours, part).named_parameters():
                theirs[published_name(name)].copy_(weight)


def made(config: DvaeConfig, **options: Any) -> Dvae:
    torch.manual_seed(0)
    return Dvae(config, **options).to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def mapped_pictures(config: DvaeConfig, count: int) -> Tensor:
    """Squares of random colours, two by two pixels of the codes' grid, so that neighbours have other codes."""
    tiles = torch.rand(count, 3, 2 * config.grid, 2 * config.grid, generator=torch.Generator().manual_seed(0))
    pixels = nn.functional.interpolate(tiles, config.image_side)
    return map_pixels(pixels).contiguous(memory_format=torch.channels_last)


def noise_for(config: DvaeConfig, count: int, device: torch.device = CPU) -> Tensor:
    return torch.rand(count, config.grid, config.grid, config.codebook, device=device).clamp_(1e-6, 1 - 1e-6)


@torch.no_grad()
def codes(config: DvaeConfig) -> dict[str, Any]:
    """Share of equal codes, and the largest distance of pixels, with the same weights in fp32."""
    ours, theirs = made(config), Published(config)
    for block in (module for module in ours.modules() if isinstance(module, Block)):
        for conv in block.convs:
            conv.weight *= LOUD  # type: ignore[operator]
    theirs.take_weights(ours)
    x = mapped_pictures(config, 2)
    found, wanted = ours.encode(x), theirs.encoder(x.contiguous()).argmax(1)
    one_hot = nn.functional.one_hot(wanted, config.codebook).permute(0, 3, 1, 2).float().contiguous()
    distance = (most_likely_pixels(ours.decode(wanted)) - most_likely_pixels(theirs.decoder(one_hot))).abs().max()
    equal = (found == wanted).double().mean().item()
    return {
        "equal": equal, "pixels": distance.item(), "distinct": len(wanted.unique()), "source": theirs.source,
    }  # fmt: skip


def stepper(model: nn.Module, x: Tensor, noise: Tensor) -> Callable[[], object]:
    """One update, with the optimiser of dvae/trainer.py."""
    objective: Any = Objective(model, FLOOR)  # type: ignore[arg-type]
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4, weight_decay=1e-4)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        objective(x, noise, TAU, BETA).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return step


def seconds_of(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def training_flops(config: DvaeConfig) -> int:
    """Of forward and backward of one picture, counted without doing them; the optimiser's are left out."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        x = torch.empty(1, 3, config.image_side, config.image_side)
        noise = torch.empty(1, config.grid, config.grid, config.codebook)
        Objective(Dvae(config), FLOOR)(x, noise, TAU, BETA).loss.backward()
    return counter.get_total_flops()


def computed_gigabytes(config: DvaeConfig, batch: int, kind: torch.dtype, recompute: bool = True) -> float:
    """The peak of all tensors that are alive at once in the second step, which has moments from the start.

    Counted on tensors without content. What a library takes beside them (a convolution's workspace) is not in it.
    """
    with FakeTensorMode():
        model = Dvae(config, kind, recompute)
        update = stepper(model, torch.empty(batch, 3, config.image_side, config.image_side), noise_for(config, batch))
        update()
        tracker = MemTracker()
        tracker.track_external(model)
        with tracker:
            update()
    kept = 2 * 4 * sum(parameter.numel() for parameter in model.parameters())  # moments, which it has not seen made
    return (tracker.get_tracker_snapshot("peak")[CPU]["Total"] + kept) / 1e9


def most_held() -> int:
    """Bytes of the most that this process held at once. (`ru_maxrss` would begin with what its parent held.)"""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def memory(config: DvaeConfig) -> dict[str, Any]:
    """Computed for 16 bit and for fp32; and what the resident memory of this process grows by in two steps in fp32.

    The steps come first: they would use again, uncounted, what computing leaves behind.
    """
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    before = most_held()
    model = made(config, recompute_blocks=True)
    update = stepper(model, mapped_pictures(config, MEMORY_BATCH), noise_for(config, MEMORY_BATCH))
    update()
    update()
    resident = (most_held() - before) / 1e9
    computed = {name: computed_gigabytes(config, MEMORY_BATCH, kind) for name, kind in (
        ("fp16", torch.float16), ("fp32", torch.float32),
    )}  # fmt: skip
    unchecked = computed_gigabytes(config, MEMORY_BATCH, torch.float16, recompute=False)
    return {"computed": computed, "without checkpointing, fp16": unchecked, "resident": resident}


def gpu(config: DvaeConfig, rounds: int = 20) -> dict[str, Any]:
    """Pictures a second of a bf16 step and of encoding, and the step's share of a bf16 product's rate."""
    if not torch.cuda.is_available():
        raise SystemExit("Error: this machine has no GPU")
    device = torch.device("cuda")
    model, x = made(config, computes=torch.bfloat16).to(device), mapped_pictures(config, GPU_BATCH).to(device)
    a, b = torch.randn(2, 8192, 8192, device=device, dtype=torch.bfloat16)
    works: dict[str, Callable[[], object]] = {
        "product": lambda: a @ b,
        "step": stepper(model, x, noise_for(config, GPU_BATCH, device)),
        "encode": torch.no_grad()(lambda: model.encode(x)),
    }
    times = {}
    for name, work in works.items():
        for _ in range(3):
            work()
        torch.cuda.synchronize()
        times[name] = seconds_of(lambda work=work: ([work() for _ in range(rounds)], torch.cuda.synchronize())) / rounds
    rate, peak = GPU_BATCH * training_flops(config) / times["step"], 2 * 8192**3 / times["product"]
    return {
        "mfu": rate / peak, "step": GPU_BATCH / times["step"], "encode": GPU_BATCH / times["encode"],
        "tflop_s": peak / 1e12, "name": torch.cuda.get_device_name(device),
        "gigabytes": torch.cuda.max_memory_allocated() / 1e9,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    measures: dict[str, Callable[[DvaeConfig], dict[str, Any]]] = {
        "codes": codes, "memory": memory, "gpu": gpu,
    }  # fmt: skip
    parser.add_argument("what", choices=measures)
    parser.add_argument("size", choices=SIZES)
    words = parser.parse_args()
    print(json.dumps(measures[words.what](SIZES[words.size])))


if __name__ == "__main__":
    main()
