"""Between backward and step: is the update to be trusted, and if so unscale, average between replicas, clip.

Every rank comes to the same answer, for it is drawn from sums over all ranks.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from cluster.power_sgd import PowerSGD
from cluster.process import Place, sum_over_ranks
from cluster.spikes import SpikeWatch
from pretrain.bad_numbers import some
from pretrain.config import TrainConfig
from pretrain.engine_replicas import Replicas, factors_of
from pretrain.engine_shards import Piece, Shards
from pretrain.optim import REST, resblock_of
from pretrain.precision import GradientScales

LOSS, NORM = "train/loss", "train/grad_norm"
SCALES_EVERY = 25  # updates between records of the gradient scales: 2 L numbers each


@dataclass(frozen=True)
class Update:
    """What became of a batch."""

    values: dict[str, float]  # what is logged: means over the ranks
    sums: dict[str, float] = field(default_factory=dict)  # what else was to be summed over the ranks
    applied: bool = True
    left_out: tuple[str, ...] = ()  # resblocks whose gradients left float16's range
    bad: tuple[str, ...] | None = None  # if Inf or NaN came that no scale explains: this rank's such gradients
    spike: str = ""  # a value that stands out of those before it

    @property
    def why_not(self) -> str:
        """Why it was not applied, or nothing."""
        if self.applied:
            return ""
        return "bad numbers" if self.bad is not None else self.spike or f"float16 overflow in {some(self.left_out)}"


class Settlement:
    """Decides about each update and prepares the gradients of those that are applied."""

    def __init__(
        self, config: TrainConfig, place: Place, shards: Shards, resblocks: Sequence[str], power: PowerSGD | None
    ) -> None:
        """power: what averages between replicas, if there are any."""
        self.config, self.place, self.shards = config, place, shards
        self.blocks = [*resblocks, REST]
        self._block_of_group = [resblock_of(names[0], self.blocks) for names in shards.group_names]
        self.scales: GradientScales | None = None
        if config.precision.startswith("fp16"):
            self.scales = GradientScales(resblocks, config.precision == "fp16-global", place.device)
        self.spikes = {LOSS: SpikeWatch(), NORM: SpikeWatch()}
        self.replicas: Replicas | None = None
        if power:
            owners = {name: resblock_of(name, self.blocks) for names in shards.group_names for name in names}
            divisors = dict(zip(resblocks, self.scales.values, strict=True)) if self.scales else {}
            self.replicas = Replicas(power, place, owners, divisors)
            if not shards.is_offloaded:
                shards.tell_when_reduced(self.replicas.meet)

    def settle(self, number: int, losses: dict[str, float], sums: dict[str, float]) -> Update:
        """Make the coming DeepSpeed step the right one for update `number`, with parts of it or all left out.

        losses: this rank's; sums: to be summed over the ranks as well. One look at the gradients serves two
        questions: a resblock's squared norm is finite only if all of them are.
        """
        groups = self.shards.pieces()
        norms = self._squared_norms(groups)
        told = sum_over_ranks(self.place, losses | sums | norms)
        norm = self.replicas.norm() if self.replicas else 0.0
        values = {tag: told[tag] / self.place.world_size for tag in losses}
        update = Update(values, {tag: told[tag] for tag in sums})
        is_bad = {block: not math.isfinite(told[block]) for block in self.blocks}
        divisors = dict.fromkeys(self.blocks, 1.0)
        if self.scales and not is_bad[REST] and math.isfinite(values[LOSS]):
            divisors |= dict(zip(self.blocks, self.scales.values.tolist(), strict=False))
            self.scales.learn(number, [is_bad[block] for block in self.blocks[:-1]])
        elif any(is_bad.values()) or not math.isfinite(values[LOSS]):
            return self._leave_out(update, bad=self._bad_gradients(groups, norms))
        overflowed = tuple(block for block in self.blocks if is_bad[block])
        if self.scales and (overflowed or number % SCALES_EVERY == 0):
            values |= self.scales.metrics()
        if overflowed and self.config.on_overflow == "update":
            return self._leave_out(update, left_out=overflowed)
        pieces = self._pieces_of_blocks(groups, [block for block in self.blocks if block not in overflowed])
        if self.replicas:
            divisors = dict.fromkeys(self.blocks, 1.0)  # undone before they were sent
        else:
            norm = math.sqrt(sum(told[block] / divisors[block] ** 2 for block in pieces))
        spike = "" if math.isinf(norm) else self._spike(values | {NORM: norm})
        if math.isinf(norm) or (spike and self.config.on_spike == "skip"):
            left_out = ("what is sent between replicas",) if math.isinf(norm) else ()
            return self._leave_out(update, left_out=left_out, spike=spike)
        values[NORM] = norm
        clip = min(1.0, self.config.optim.clip / (norm + 1e-6))
        multiply(pieces, {block: clip / divisors[block] for block in pieces})
        if self.replicas:
            self.shards.take_factors(factors_of(self.replicas.power), clip)
        self.shards.skip([group for group, block in enumerate(self._block_of_group) if block in overflowed])
        return Update(values, update.sums, True, overflowed, spike=spike)

    def close(self, update: Update) -> None:
        """After DeepSpeed's step."""
        if self.replicas:
            self.replicas.finish(update.applied)

    def state(self) -> dict[str, Any]:
        """For a checkpoint, as JSON."""
        spikes = {tag: watch.state() for tag, watch in self.spikes.items()}
        return {"spikes": spikes, "scales": self.scales.state() if self.scales else None}

    def restore(self, state: dict[str, Any]) -> None:
        for tag, watch in self.spikes.items():
            watch.restore(state["spikes"][tag])
        if self.scales and state["scales"]:
            self.scales.restore(state["scales"])

    def _leave_out(self, update: Update, **why: Any) -> Update:
        self.shards.skip(range(len(self._block_of_group)))
        return Update(update.values, update.sums, False, **why)

    def _bad_gradients(self, groups: list[list[Piece]], norms: dict[str, float]) -> tuple[str, ...]:
        """Names of this rank's gradients that are not finite; with replicas of all in a resblock that has one."""
        owners = zip(self._block_of_group, groups, strict=True)
        suspects = [piece for block, pieces in owners if not math.isfinite(norms[block]) for piece in pieces]
        return tuple(piece.name for piece in suspects if self.replicas or not bool(piece.gradient.isfinite().all()))

    def _spike(self, values: dict[str, float]) -> str:
        spikes = {tag: watch.judge(values[tag]) for tag, watch in self.spikes.items()}
        return "; ".join(f"{tag} {spike}" for tag, spike in spikes.items() if spike)

    def _pieces_of_blocks(self, groups: list[list[Piece]], blocks: list[str]) -> dict[str, list[Piece]]:
        pieces: dict[str, list[Piece]] = {block: [] for block in blocks}
        for block, group in zip(self._block_of_group, groups, strict=True):
            if block in pieces:
                pieces[block] += group
        return pieces

    def _squared_norms(self, groups: list[list[Piece]]) -> dict[str, float]:
        """The squared norm of this rank's gradients, resblock by resblock."""
        if self.replicas:
            return self.replicas.squared_norms([piece for pieces in groups for piece in pieces])
        gradients = [piece.gradient for pieces in groups for piece in pieces]
        owners = [block for block, pieces in zip(self._block_of_group, groups, strict=True) for _ in pieces]
        sums = dict.fromkeys(self.blocks, 0.0)
        if gradients:
            norms = torch.stack(torch._foreach_norm(gradients, dtype=torch.float32)).double().square().tolist()
            for block, value in zip(owners, norms, strict=True):
                sums[block] += value
        return sums


def multiply(pieces: dict[str, list[Piece]], factors: dict[str, float]) -> None:
    """The gradients of each resblock by its factor."""
    for block, factor in factors.items():
        if pieces[block] and factor != 1.0:
            torch._foreach_mul_([piece.gradient for piece in pieces[block]], factor)
