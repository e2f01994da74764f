"""One update of the discrete VAE, of one process or of many, and what a checkpoint holds.

Many processes hold replicas, and torch's DistributedDataParallel averages their gradients in fp32, bucket by
bucket while the backward pass goes on. Sharding as the transformer's would save little: at the published size
weights, gradients and moments are 98 M parameters, 1.6 GB, and the activations are what fills a device.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from cluster.process import Place, sum_over_ranks
from cluster.settings import UserError
from cluster.weights import load_state, save_state
from data_pipeline.folders import Shards
from data_pipeline.loader import ImageBatch, first_pictures
from dvae.average import Average
from dvae.config import DvaeTrainConfig
from dvae.likelihood import map_pixels
from dvae.measure import counts_of, usage_of
from dvae.model import Dvae
from dvae.noise import uniform_rows
from dvae.objective import Objective, Terms
from dvae.schedule import kl_weight, learning_rate, temperature
from dvae.seed import seed_codes

N_SEED_PICTURES = 2_048
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
BESIDE = "beside.pt"  # in a checkpoint, next to weights and moments: the average and the loss scale, if there are any


@dataclass(frozen=True)
class Update:
    """What a step did: values to log, `Seen.sums` over all ranks, and why its update was left out, if it was."""

    values: dict[str, float]
    sums: dict[str, float]
    why_not: str = ""


class Trainer:
    """Model, optimiser and the noise of one run. Every rank has one and calls it in step."""

    def __init__(self, config: DvaeTrainConfig, shards: Shards, place: Place) -> None:
        self.config, self.place = config, place
        torch.manual_seed(config.seed)
        model = Dvae(config.model, DTYPES[config.precision], config.activation_checkpointing == "block")
        if config.start == "seeded":
            pictures = first_pictures(shards, N_SEED_PICTURES, config.model.image_side)
            seed_codes(model, map_pixels(pictures), torch.Generator().manual_seed(config.seed))
        self.model: Dvae = model.to(place.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        objective = Objective(self.model, config.min_log_scale, config.relaxation, config.likelihood)
        self._objective = replicated(objective, place)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), betas=(0.9, 0.999), eps=1e-8, weight_decay=config.weight_decay
        )
        self._scaler = torch.amp.GradScaler(place.device.type, enabled=config.precision == "fp16")
        self._average = Average(self.model, config.average_decay) if config.average_decay else None

    @property
    def released(self) -> Dvae:
        """What is measured and released: the average of the iterates, if the run keeps one."""
        return self._average.model if self._average else self.model

    def step(self, number: int, batch: ImageBatch) -> Update:
        """One update on this rank's part of the batch. UserError if the gradient has an Inf or NaN that no smaller
        loss scale can cure."""
        config, schedule = self.config, self.config.schedule
        tau, beta, rate = temperature(schedule, number), kl_weight(schedule, number), learning_rate(schedule, number)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        mapped = map_pixels(batch.pixels.to(self.place.device)).contiguous(memory_format=torch.channels_last)
        terms: Terms = self._objective(mapped, self._noise(number, len(mapped)), tau, beta)
        self.optimizer.zero_grad(set_to_none=True)
        self._scaler.scale(terms.loss).backward()
        norm, why_not = self._update(number)
        if self._average:
            self._average.update(number)
        means = {"train/loss": terms.loss.item(), "train/nats": terms.nats.item(), "train/kl": terms.kl.item()}
        totals = sum_over_ranks(self.place, means | batch.seen.sums)
        used, perplexity = usage_of(counts_of(terms.codes, config.model.codebook, self.place))
        values = {name: totals[name] / self.place.world_size for name in means} | {
            "vae/codes_used_in_batch": used, "vae/perplexity_in_batch": perplexity,
            "vae/temperature": tau, "vae/beta": beta, "train/lr": rate, "train/grad_norm": norm,
        }  # fmt: skip
        if self._scaler.is_enabled():
            values["train/loss_scale"] = self._scaler.get_scale()
        return Update(values, {name: totals[name] for name in batch.seen.sums}, why_not)

    def save(self, folder: Path, tag: str) -> None:
        """The whole state into folder / tag, from rank 0: the others hold the same."""
        if not self.place.is_main:
            return
        save_state(folder / tag, self.model, self.optimizer)
        if beside := self._beside():
            torch.save(beside, folder / tag / BESIDE)

    def load(self, folder: Path, tag: str) -> None:
        """The inverse of `save`, on any number of ranks."""
        load_state(folder / tag, self.model, self.optimizer, self.place.device)
        path, beside = folder / tag / BESIDE, dict[str, Any]()
        if path.is_file():
            beside = torch.load(path, map_location=self.place.device, weights_only=True)
        if self._average:  # one that begins late begins with the weights
            self._average.restore(beside.get("average", self.model.state_dict()))
        if self._scaler.is_enabled() and "scaler" in beside:
            self._scaler.load_state_dict(beside["scaler"])

    def _noise(self, number: int, count: int) -> Tensor:
        first = self.place.rank * count
        shape = (self.config.model.grid, self.config.model.grid, self.config.model.codebook)
        return uniform_rows(self.config.seed, number, range(first, first + count), shape, self.place.device)

    def _update(self, number: int) -> tuple[float, str]:
        """Apply the gradients; their norm, and why they were not applied, if they were not. The same on all ranks."""
        self._scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip).item()
        if math.isfinite(norm):
            self._scaler.step(self.optimizer)
            self._scaler.update()
            return norm, ""
        scale = self._scaler.get_scale()
        if not self._scaler.is_enabled() or scale < 1:
            at = f" with a loss scale of {scale:g}" if self._scaler.is_enabled() else ""
            raise UserError(f"the gradient norm is {norm} at step {number}{at}: lower schedule.lr or clip")
        self._scaler.update()
        return norm, f"overflow at a loss scale of {scale:g}"

    def _beside(self) -> dict[str, Any]:
        average = {"average": self._average.state()} if self._average else {}
        return average | ({"scaler": self._scaler.state_dict()} if self._scaler.is_enabled() else {})


def replicated(objective: Objective, place: Place) -> nn.Module:
    """The module itself in one process; in many, with the weights of rank 0 and gradients averaged over all."""
    if place.world_size == 1:
        return objective
    # The buckets are as at the start for the whole run: torch would make others after the first update, so that a
    # resumed run, which makes its first update later, would add in another order.
    return DistributedDataParallel(objective, find_unused_parameters=True, gradient_as_bucket_view=True)
