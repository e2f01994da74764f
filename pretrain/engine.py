"""The transformer under DeepSpeed: the only file that imports it.

DeepSpeed's settings are derived from ours and handed over as a dict; there is no second file to
keep in step.
"""

import importlib
import logging
import math
import os
import warnings
from pathlib import Path
from typing import Any

import torch

from cluster.process import Place, mean_over_ranks, sum_over_ranks, wait_for_all
from cluster.settings import UserError
from cluster.weights import save_weights
from data_pipeline.loader import TokenBatch, words_in
from pretrain.config import TrainConfig
from pretrain.model import Losses, Sizes, Transformer, text_image_loss
from pretrain.optim import decay_groups, learning_rate


class Engine:
    """A sharded model with its optimiser; every rank calls every method in step."""

    def __init__(self, model: Transformer, config: TrainConfig, place: Place) -> None:
        self.model, self.config, self.place = model, config, place
        self._deepspeed = _import_deepspeed(place)
        optimizer = torch.optim.AdamW(
            decay_groups(model, config.optim.weight_decay),
            lr=config.optim.lr, betas=(config.optim.beta1, config.optim.beta2), eps=config.optim.eps, fused=True,
        )  # fmt: skip
        self._engine, self._optimizer, _, _ = self._deepspeed.initialize(
            model=model, optimizer=optimizer, config=deepspeed_settings(config, place.world_size)
        )

    def step(self, number: int, batch: TokenBatch) -> dict[str, float]:
        """One update; returns the means over ranks of what is logged."""
        lr = learning_rate(self.config.optim, number, self.config.n_steps)
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._engine.train()
        words = sum_over_ranks(self.place, {"words": words_in(batch)})["words"]
        losses = self.losses(batch, words / self.place.world_size)
        self._engine.backward(losses.total)
        self._engine.step()
        values = {"train/loss": losses.total, "train/text_loss": losses.text, "train/image_loss": losses.image}
        means = mean_over_ranks(self.place, {tag: value.item() for tag, value in values.items()})
        if not math.isfinite(means["train/loss"]):
            raise UserError(
                f"the training loss is {means['train/loss']} at step {number}; checkpoints are from before it: "
                "go on from them with a smaller optim.lr in another `out`"
            )
        return means | {"train/lr": lr, "train/grad_norm": float(self._engine.get_global_grad_norm() or math.nan)}

    def losses(self, batch: TokenBatch, n_words: float) -> Losses:
        """The two losses of this rank's batch, the text's divided by n_words, with their graph if gradients are on."""
        text, image = batch.text.to(self.place.device), batch.image.to(self.place.device)
        text_logits, image_logits = self._engine(text, image)
        weight = self.config.text_weight
        return text_image_loss(text_logits, image_logits, text, image, weight, max(n_words, 1.0))

    def evaluating(self) -> None:
        self._engine.eval()

    def save(self, folder: Path, tag: str) -> None:
        """DeepSpeed's own files into folder / tag."""
        self._engine.save_checkpoint(str(folder), tag=tag, save_latest=False)

    def load(self, folder: Path, tag: str) -> None:
        self._engine.load_checkpoint(str(folder), tag=tag)

    def release(self, folder: Path) -> None:
        """The whole weights, from any ZeRO stage, as the release of a run folder.

        Stored as fp32, with the values the model computes with: in a bf16 run those of its bf16 copy.
        """
        parameters = list(self.model.parameters())
        with self._deepspeed.zero.GatheredParameters(parameters, enabled=self.config.zero_stage == 3):
            if self.place.is_main:
                save_weights(folder, {name: p.float() for name, p in self.model.named_parameters()})
        wait_for_all(self.place)


def deepspeed_settings(config: TrainConfig, world_size: int) -> dict[str, Any]:
    """DeepSpeed's settings for a run of ours, under the names of its documentation."""
    return {
        "train_micro_batch_size_per_gpu": config.data.batch // world_size,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.optim.clip,
        "zero_optimization": {"stage": config.zero_stage},
        "bf16": {"enabled": config.precision == "bf16"},
        "zero_allow_untested_optimizer": True,  # torch's AdamW needs no compiled extension
        "steps_per_print": 2**31,
    }


def build_engine(config: TrainConfig, sizes: Sizes, place: Place) -> Engine:
    """A fresh engine; the initial weights depend on the seed alone."""
    torch.manual_seed(config.seed)
    model = Transformer(config.model, sizes, config.attention, config.activation_checkpointing).to(place.device)
    if config.compile:
        model.compile_mlps()
    return Engine(model, config, place)


def _import_deepspeed(place: Place) -> Any:
    """DeepSpeed, imported when it is needed: its import looks for devices and prints.

    On a CPU it would compile a shared-memory all-reduce at start, which only inference calls;
    without it neither a compiler nor 40 seconds are needed.
    """
    os.environ.setdefault("DS_ACCELERATOR", place.device.type)
    deepspeed = importlib.import_module("deepspeed")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")  # DeepSpeed's calls, not ours
    if place.device.type == "cpu":
        importlib.import_module("deepspeed.ops").__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend=None, auto_mpi_discovery=False, verbose=False)
    return deepspeed
