"""Train the discrete VAE: image shards -> a run folder with `model.safetensors`.

    smalti dvae emoji-64 images=data/images out=runs/dvae

The objective is Ramesh et al. 2021, section 2.1 and appendix A: logit-Laplace likelihood plus
beta times KL to a uniform prior, through a Gumbel-softmax relaxation used forward and backward.
Code usage is logged from the first step. Ctrl-C saves; the same command goes on. `emoji-64` takes
about 2 minutes on 2 CPU cores.
"""

import math
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cluster.command import Command, run_command
from cluster.manifest import Manifest, read_manifest
from cluster.process import Place, lone_place
from cluster.run import Run, due
from cluster.settings import UserError, from_dict
from cluster.weights import WEIGHTS, load_state, load_weights, save_state, save_weights
from data_pipeline.folders import Shards
from data_pipeline.foreign import open_images
from data_pipeline.loader import ImageBatches, first_pictures
from data_pipeline.order import GUMBEL, counter_random
from dvae.config import DvaeConfig, DvaeTrainConfig
from dvae.likelihood import logit_laplace_nats, map_pixels
from dvae.measure import code_usage, measure
from dvae.model import Dvae
from dvae.schedule import kl_weight, learning_rate, temperature
from dvae.seed import seed_codes
from kernels.relaxed_codes import relaxed_codes

N_SEED_PICTURES = 2_048
N_EVALUATION = 1_024  # held-out pictures measured during training


class Trainer:
    """Model, optimiser and the noise of one run."""

    def __init__(self, config: DvaeTrainConfig, shards: Shards, place: Place) -> None:
        self.config, self.place = config, place
        torch.manual_seed(config.seed)
        model = Dvae(config.model)
        if config.start == "seeded":
            pictures = first_pictures(shards, N_SEED_PICTURES, config.model.image_side)
            seed_codes(model, map_pixels(pictures), torch.Generator().manual_seed(config.seed))
        self.model: Dvae = model.to(place.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), betas=(0.9, 0.999), eps=1e-8, weight_decay=config.weight_decay
        )

    def step(self, number: int, pixels: Tensor) -> dict[str, float]:
        """One update on pixels (B, 3, P, P) in [0, 1]."""
        config, schedule = self.config, self.config.schedule
        tau, beta = temperature(schedule, number), kl_weight(schedule, number)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(schedule, number)
        mapped = map_pixels(pixels.to(self.place.device)).contiguous(memory_format=torch.channels_last)
        logits = self.model.encoder(mapped).permute(0, 2, 3, 1)  # (B, G, G, K)
        weights, kl = relaxed_codes(logits, self._uniform(number, logits), tau)
        parameters = self.model.decoder(weights.permute(0, 3, 1, 2))
        nats = logit_laplace_nats(parameters, mapped, config.min_log_scale).mean()
        kl = kl.mean()
        loss = nats + effective_kl_weight(config.model, beta) * kl
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), config.clip)
        if not math.isfinite(norm.item()):
            raise UserError(f"the gradient norm is {norm.item()} at step {number}: lower schedule.lr or clip")
        self.optimizer.step()
        used, perplexity = code_usage(logits.argmax(-1), config.model.codebook)
        return {
            "train/loss": loss.item(), "train/nats": nats.item(), "train/kl": kl.item(),
            "vae/codes_used_in_batch": used, "vae/perplexity_in_batch": perplexity,
            "vae/temperature": tau, "vae/beta": beta, "train/lr": learning_rate(schedule, number),
            "train/grad_norm": norm.item(),
        }  # fmt: skip

    def _uniform(self, number: int, like: Tensor) -> Tensor:
        """Noise of a step in (0, 1), from (seed, step) alone, so that a resumed run draws the same."""
        generator = torch.Generator(like.device)
        generator.manual_seed(int(counter_random(self.config.seed, GUMBEL, number).integers(2**62)))
        tiny = torch.finfo(torch.float32).eps
        return torch.rand(like.shape, device=like.device, generator=generator).clamp_(tiny, 1 - tiny)

    def save(self, folder: Path, tag: str) -> None:
        save_state(folder / tag, self.model, self.optimizer)

    def load(self, folder: Path, tag: str) -> None:
        load_state(folder / tag, self.model, self.optimizer, self.place.device)


def effective_kl_weight(config: DvaeConfig, beta: float) -> float:
    """Weight of the per-position mean KL beside the per-value mean likelihood.

    Both are sums divided by the number of pixel values (A.2), so beta * G^2 / (3 P^2): beta / 192 at
    a reduction of 8.
    """
    return beta * config.grid**2 / (3 * config.image_side**2)


def train(config: DvaeTrainConfig) -> None:
    """Run the stage; see the module's text."""
    place = lone_place()
    folders = open_images(config.images, config.heldout_images, Path(config.out) / "indexes", config.cache)
    shards = Shards(folders, "images", "train")
    run = Run(config, "dvae", ("images", "heldout_images"), {"images": shards.manifest.fingerprint}, place)
    if run.is_finished:
        run.say("finished already")
        return
    heldout = first_pictures(Shards(folders, "images", "heldout"), N_EVALUATION, config.model.image_side)
    trainer = Trainer(config, shards, place)
    batches = ImageBatches(shards, config.data, config.model.image_side, config.flip)
    first = run.begin(trainer.load, batches.about_order)
    batches.seek(first)
    if first == 0:
        run.record_evaluation(-1, measure(trainer.model, heldout, place.device))
    for step in range(first, config.n_steps):
        batch = next(batches)
        run.record(step, trainer.step(step, batch.pixels))
        run.record_samples(step, batch.seen)
        stop = run.told_to_stop()
        if due(step, config.evaluate_every, config.n_steps):
            run.record_evaluation(step, measure(trainer.model, heldout, place.device))
        if stop or due(step, config.save_every, config.n_steps):
            run.save(step + 1, trainer.save)
        if stop and step + 1 < config.n_steps:
            run.stopped(step + 1)
    save_weights(run.folder, trainer.model.state_dict())
    counts: dict[str, Any] = {"steps": config.n_steps} | measure(trainer.model, heldout, place.device)
    run.finish(counts, {"model_type": "smalti-dvae", **asdict(config.model)}, [WEIGHTS])
    run.close()


def open_dvae(folder: Path, device: torch.device) -> tuple[Dvae, Manifest]:
    """The trained dVAE of a finished run folder, in eval mode, and its manifest."""
    manifest = read_manifest(folder, "dvae")
    model = Dvae(from_dict(DvaeConfig, manifest.settings["model"]))
    load_weights(folder, model)
    model.eval().to(device)
    return model, manifest


COMMAND = Command("dvae", DvaeTrainConfig, Path(__file__).parent / "configs", train, __doc__)

if __name__ == "__main__":
    sys.exit(run_command(COMMAND, sys.argv[1:]))
