"""Train the discrete VAE: image shards -> a run folder with `model.safetensors`.

    smalti dvae emoji-64 images=data/images out=runs/dvae   one process
    deepspeed --num_gpus 8 --module dvae.train FILE         eight
    torchrun --nproc-per-node 2 -m dvae.train emoji-64      two

The objective is Ramesh et al. 2021, section 2.1 and appendix A: logit-Laplace likelihood plus
beta times KL to a uniform prior, through a Gumbel-softmax relaxation used forward and backward.
Code usage is logged from the first step. Ctrl-C saves; the same command goes on. `emoji-64` takes
90 seconds on 2 CPU cores.
"""

import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import torch

from cluster.command import Command, run_command
from cluster.manifest import FolderError, Manifest, read_manifest
from cluster.process import Place, gathered, joined_place, share_cores
from cluster.run import Run, due
from cluster.settings import UserError, from_dict
from cluster.weights import WEIGHTS, load_weights, save_weights
from data_pipeline.augment import TWELVE_EIGHTHS, check_room
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
T = TypeVar("T")


def train(config: DvaeTrainConfig, place: Place) -> None:
    """Run the stage; see the module's text."""
    folders = opened(config, place)
    shards = Shards(folders, "images", "train")
    inputs = ("images", "heldout_images", "fid_inception")
    run = Run(config, "dvae", inputs, {"images": shards.manifest.fingerprint}, place, WRITERS)
    if run.is_finished:
        run.say("finished already")
        return
    side, crop = config.model.image_side, config.augment == "paper"
    for folder in folders if crop else []:
        if warning := check_room(folder.manifest, side, TWELVE_EIGHTHS):
            run.say(warning)
    features = Features(Path(config.fid_inception), place.device) if config.fid_inception else None
    heldout = on_all_ranks(place, lambda: HeldOut(Shards(folders, "images", "heldout"), side, place))
    trainer = Trainer(config, shards, place)
    batches = ImageBatches(shards, config.data, side, config.flip, place.rank, place.world_size, crop)
    measured = loop(config, run, trainer, batches, heldout)
    measured = measured or measure(config, trainer, heldout, config.n_steps - 1).values
    if features:
        pairs = (features.of(pixels, place) for pixels in (heldout.pixels, heldout.reconstructions(trainer.released)))
        measured |= {"val/fid": frechet_distance(*pairs)}
        run.record_evaluation(config.n_steps - 1, {"val/fid": measured["val/fid"]})
    if place.is_main:
        save_weights(run.folder, trainer.released.state_dict())
    counts: dict[str, Any] = {"steps": config.n_steps} | measured
    run.finish(counts, {"model_type": "smalti-dvae", **asdict(config.model)}, [WEIGHTS])
    run.close()


def loop(config: DvaeTrainConfig, run: Run, trainer: Trainer, batches: ImageBatches, heldout: HeldOut) -> Measures:
    """All steps that are left; the last held-out measurement."""
    alarm = Alarm(config, run.say)
    first = run.begin(trainer.load, batches.about_order)
    alarm.go_on(run)
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
    return heldout.measure(trainer.released, Elbo(config.seed, tau, config.min_log_scale, config.likelihood))


def opened(config: DvaeTrainConfig, place: Place) -> list[Folder]:
    """The pictures; rank 0 goes first, for it may have to write indexes that the others then read."""

    def look() -> list[Folder]:
        return open_images(config.images, config.heldout_images, Path(config.out) / "indexes", config.cache)

    first = on_all_ranks(place, lambda: look() if place.is_main else [])
    return on_all_ranks(place, lambda: first or look())


def on_all_ranks(place: Place, work: Callable[[], T]) -> T:
    """What `work` gives on this rank, once every rank has done it.

    If it fails on one, all raise, so that none waits for what will not come; rank 0 says what the first one found.
    """
    done: list[T] = []
    failure: Exception | None = None
    try:
        done.append(work())
    except (UserError, OSError) as error:
        failure = error
    told = gathered(place, None if failure is None else str(failure))
    rank = next((rank for rank, text in enumerate(told) if text is not None), None)
    if rank is None:
        return done[0]
    if failure and place.is_main:
        raise failure
    raise FolderError(f"{told[rank]} (found by rank {rank})")


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
