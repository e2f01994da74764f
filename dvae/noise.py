"""The Gumbel noise of a sample: a function of (seed, step, its place in the batch), whatever the number of ranks."""

import torch
from torch import Tensor

from data_pipeline.order import GUMBEL, counter_random

TINY = torch.finfo(torch.float32).eps
SEEDS = 2**62


def uniform_rows(
    seed: int, step: int, rows: range, shape: tuple[int, ...], device: torch.device | str = "cpu"
) -> Tensor:
    """(len(rows), *shape) float32 in (0, 1): the noise of these samples of a step's batch.

    On a CPU all samples share one stream of numbers, and what belongs to the samples before the first is
    drawn and dropped. What a GPU draws depends on how many numbers are asked for at once, so there each
    sample has a seed of its own.
    """
    seeds = counter_random(seed, GUMBEL, step).integers(SEEDS, size=max(rows.stop, 1))
    noise = torch.empty((len(rows), *shape), device=device)
    generator = torch.Generator(noise.device)
    if noise.device.type == "cpu":
        generator.manual_seed(int(seeds[0]))
        for _ in range(rows.start):
            torch.rand(shape, generator=generator)
        noise.uniform_(generator=generator)
    else:
        for row, number in zip(noise, seeds[rows.start :], strict=True):
            row.uniform_(generator=generator.manual_seed(int(number)))
    return noise.clamp_(TINY, 1 - TINY)
