"""Train the discrete VAE: image shards -> a run folder with `model.safetensors`.

    smalti dvae emoji-64 images=data/images out=runs/dvae   one process
    deepspeed --num_gpus 8 --module dvae.train FILE         eight
    torchrun --nproc-per-node 2 -m dvae.train emoji-64      two

The objective is Ramesh et al. 2021, section 2.1 and appendix A: logit-Laplace likelihood plus
beta times KL to a uniform prior, through a Gumbel-softmax relaxation used forward and backward.
Code usage is logged from the first step. Ctrl-C saves; the same command goes on. `emoji-64` takes
about 2 minutes on 2 CPU cores.
"""

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from cluster.command import Command, run_command
from cluster.manifest import Manifest, read_manifest
from cluster.process import Place, joined_place, share_cores, wait_for_all
from cluster.run import Run, due
from cluster.settings import from_dict
from cluster.weights import WEIGHTS, load_weights, save_weights
from data_pipeline.folders import Folder, Shards
from data_pipeline.foreign import open_images
from data_pipeline.loader import ImageBatches
from dvae.config import DvaeConfig, DvaeTrainConfig
from dvae.fid import Features, frechet_distance
from dvae.health import Alarm, show
from dvae.measure import Elbo, HeldOut, Measured, Measures
from dvae.model import Dvae
from dvae.schedule import temperature
from dvae.trainer import Trainer

WRITERS = range(1)  # of checkpoints: all ranks hold the same


def train(config: DvaeTrainConfig, place: Place) -> None:
    """Run the stage; see the module's text."""
    folders = opened(config, place)
    shards = Shards(folders, "images", "train")
    inputs = ("images", "heldout_images", "fid_inception")
    run = Run(config, "dvae", inputs, {"images": shards.manifest.fingerprint}, place, WRITERS)
    if run.is_finished:
        run.say("finished already")
        return
    features = Features(Path(config.fid_inception), place.device) if config.fid_inception else None
    heldout = HeldOut(Shards(folders, "images", "heldout"), config.model.image_side, place)
    trainer = Trainer(config, shards, place)
    crop = config.augment == "paper"
    batches = ImageBatches(
        shards, config.data, config.model.image_side, config.flip, place.rank, place.world_size, crop
    )
    measured = loop(config, run, trainer, batches, heldout)
    measured = measured or measure(config, trainer, heldout, config.n_steps - 1).values
    if features:
        pairs = (features.of(pixels, place) for pixels in (heldout.pixels, heldout.reconstructions(trainer.released)))
        measured |= {"val/fid": frechet_distance(*pairs)}
        run.record_evaluation(config.n_steps - 1, {"val/fid": measured["val/fid"]})
    else:
        run.say("FID is left out: fid_inception names no TorchScript Inception")
    if place.is_main:
        save_weights(run.folder, trainer.released.state_dict())
    counts: dict[str, Any] = {"steps": config.n_steps} | measured
    run.finish(counts, {"model_type": "smalti-dvae", **asdict(config.model)}, [WEIGHTS])
    run.close()


def loop(config: DvaeTrainConfig, run: Run, trainer: Trainer, batches: ImageBatches, heldout: HeldOut) -> Measures:
    """All steps that are left; the last held-out measurement."""
    alarm = Alarm(config, run.say)
    first = run.begin(trainer.load, batches.about_order)
    batches.seek(first)
    last: Measures = {}
    if first == 0:
        evaluate(config, run, trainer, heldout, -1)
    for step in range(first, config.n_steps):
        batch = next(batches)
        update = trainer.step(step, batch)
        run.record(step, update.values)
        run.record_samples(step, batch.seen, update.sums, update.why_not)
        stop = run.told_to_stop()  # one answer for all ranks
        if due(step, config.evaluate_every, config.n_steps):
            last = evaluate(config, run, trainer, heldout, step)
            alarm.look(step, last)
        if stop or due(step, config.save_every, config.n_steps):
            run.save(step + 1, trainer.save)
        if stop and step + 1 < config.n_steps:
            run.stopped(step + 1)
    return last


def evaluate(config: DvaeTrainConfig, run: Run, trainer: Trainer, heldout: HeldOut, step: int) -> Measures:
    """Measure on the held-out pictures after a step, and tell it."""
    measured = measure(config, trainer, heldout, step)
    run.record_evaluation(step, measured.values)
    show(run, step, measured)
    return measured.values


def measure(config: DvaeTrainConfig, trainer: Trainer, heldout: HeldOut, step: int) -> Measured:
    """The held-out measurement after a step, relaxed as that step was."""
    tau = temperature(config.schedule, max(step, 0))
    return heldout.measure(trainer.released, Elbo(config.seed, tau, config.min_log_scale))


def opened(config: DvaeTrainConfig, place: Place) -> list[Folder]:
    """The pictures; rank 0 goes first, for it may have to write indexes that the others then read."""
    if not place.is_main:
        wait_for_all(place)
    folders = open_images(config.images, config.heldout_images, Path(config.out) / "indexes", config.cache)
    if place.is_main:
        wait_for_all(place)
    return folders


def run_train(config: DvaeTrainConfig) -> None:
    """Join the job and train."""
    with joined_place() as place:
        if place.world_size > 1:
            share_cores(place)
        train(config, place)


def open_dvae(folder: Path, device: torch.device, computes: torch.dtype = torch.float32) -> tuple[Dvae, Manifest]:
    """The trained dVAE of a finished run folder, in eval mode, and its manifest. computes: see `Dvae`."""
    manifest = read_manifest(folder, "dvae")
    model = Dvae(from_dict(DvaeConfig, manifest.settings["model"]), computes)
    load_weights(folder, model)
    model.eval().to(device)
    return model, manifest


COMMAND = Command("dvae", DvaeTrainConfig, Path(__file__).parent / "configs", run_train, __doc__)

if __name__ == "__main__":
    sys.exit(run_command(COMMAND, sys.argv[1:]))
