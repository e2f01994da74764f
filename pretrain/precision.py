"""The gradient scales of float16 training: one for each resblock, or one for all.

Activation gradients of a deep text-to-image model span more exponents than float16 has: one scale for
the whole loss loses those of late resblocks to underflow or those of early ones to overflow. A scale
for every resblock keeps each near the top of the range (Ramesh et al. 2021, section 2.4).
"""

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

Precision = Literal["auto", "fp32", "bf16", "fp16-global", "fp16-resblock"]

# Ramesh et al. 2021, appendix D, as log2. The paper's are times M, the number of GPUs, because it divides
# the loss by the batch of all GPUs; here each rank divides by its own batch and gradients are averaged.
START, LOWEST, HIGHEST = 13.0, 7.0, 24.0
GROWTH = 1 / 1000  # an update without a bad gradient: doubled in a thousand
BACK_OFF = 0.5  # an update with one: divided by the root of 2
CALM = 125  # updates after a division in which there is no other


class GradientScales:
    """The scales, and the rule by which they move."""

    def __init__(self, names: Sequence[str], tied: bool, device: torch.device) -> None:
        """names: of the 2 L resblocks. tied: one scale serves them all, as in ordinary loss scaling."""
        self.names, self.tied = tuple(names), tied
        self.log2 = [START] * len(names)
        self.divided_at = [-CALM] * len(names)
        self.skips = [0] * len(names)
        self.values: Tensor = torch.empty(len(names), device=device)  # what the backward pass reads
        self._publish()

    def learn(self, step: int, bad: Sequence[bool]) -> None:
        """Move the scales after an update; bad: had the resblock's parameter gradients an Inf or NaN?"""
        if self.tied:
            bad = [any(bad)] * len(bad)
        for number, is_bad in enumerate(bad):
            self.skips[number] += is_bad
            if not is_bad:
                self.log2[number] += GROWTH
            elif step - self.divided_at[number] >= CALM:
                self.log2[number] -= BACK_OFF
                self.divided_at[number] = step
            self.log2[number] = min(max(self.log2[number], LOWEST), HIGHEST)
        self._publish()

    def metrics(self) -> dict[str, float]:
        """`scale/NAME`, log2, and `skips/NAME`, updates so far that the resblock spoilt (the paper's figure 12)."""
        shown = range(1) if self.tied else range(len(self.names))
        names = ["all"] if self.tied else self.names
        logs = {f"scale/{names[number]}": self.log2[number] for number in shown}
        return logs | {f"skips/{names[number]}": float(self.skips[number]) for number in shown}

    def state(self) -> dict[str, Any]:
        """For a checkpoint, as JSON."""
        return {"log2": self.log2, "divided_at": self.divided_at, "skips": self.skips}

    def restore(self, state: dict[str, Any]) -> None:
        self.log2, self.divided_at, self.skips = (list(state[key]) for key in ("log2", "divided_at", "skips"))
        self._publish()

    def _publish(self) -> None:
        self.values.copy_(torch.tensor([math.exp2(value) for value in self.log2]))
