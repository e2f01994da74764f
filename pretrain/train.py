"""Train the transformer: token shards -> a run folder with checkpoints and `model.safetensors`.

    smalti train emoji                                   one process
    deepspeed --num_gpus 8 --module pretrain.train FILE  eight
    torchrun --nproc-per-node 2 -m pretrain.train emoji  two

Ctrl-C, SIGTERM and SIGUSR1 save at the next step edge; the same command goes on from there.
`emoji` takes about 5 minutes on 2 CPU cores in two processes.
"""

import sys
from dataclasses import asdict, replace
from pathlib import Path

from cluster.checkpoint import found_in
from cluster.command import Command, run_command
from cluster.manifest import refuse_other_origin
from cluster.process import Place, computes_bf16, joined_place, share_cores
from cluster.run import Run, due
from cluster.settings import UserError
from cluster.weights import WEIGHTS
from data_pipeline.bpe import open_vocabulary
from data_pipeline.folders import Shards, open_folders
from data_pipeline.loader import TokenBatch, TokenBatches
from pretrain.config import TrainConfig
from pretrain.dry_run import dry_run
from pretrain.engine import Engine
from pretrain.engine_update import Update
from pretrain.evaluate import HeldOut, evaluate
from pretrain.model import Sizes

MOST_BAD_IN_A_ROW = 10  # updates with an Inf or NaN, after which no next one can be hoped for


def train(config: TrainConfig, place: Place) -> None:
    """Run the stage; see the module's text."""
    vocabulary, vocab = open_vocabulary(Path(config.vocab))
    shards = open_tokens(config, "train")
    about = shards.manifest
    refuse_other_origin(Path(config.tokens), about, "vocab", Path(config.vocab), vocab)
    made_from = {"tokens": about.fingerprint, "dvae": about.made_from["dvae"], "vocab": vocab}
    writers = range(config.zero_shards or place.world_size)
    run = Run(config, "transformer", ("tokens", "vocab"), made_from, place, writers)
    if run.is_finished:
        run.say("finished already")
        return
    warn_of_cut_captions(run, shards, config.model.n_text)
    sizes = Sizes(vocabulary.size, about.counts["codebook"], about.counts["grid"])
    heldout = HeldOut(open_tokens(config, "heldout"), vocabulary, config.model.n_text)
    engine = Engine(config, sizes, place)
    engine.save_through(run.checkpoints.writer)
    batches = TokenBatches(
        shards, config.data, vocabulary, config.model.n_text, config.bpe_dropout, config.caption_dropout,
        place.rank, place.world_size,
    )  # fmt: skip
    last = loop(config, run, engine, batches, heldout)
    engine.release(run.folder)
    run.finish(
        {"steps": config.n_steps} | (last or evaluate(engine, heldout)),
        {"model_type": "smalti-transformer", **asdict(config.model), **asdict(sizes)},
        [WEIGHTS],
    )
    run.close()


def loop(config: TrainConfig, run: Run, engine: Engine, batches: TokenBatches, heldout: HeldOut) -> dict[str, float]:
    """All steps that are left; the last held-out measurement."""
    step = run.begin(engine.load, batches.about_order)
    batches.seek(step)
    last: dict[str, float] = {}
    trouble = Trouble()
    while step < config.n_steps:
        batch = next(batches)
        update = engine.step(step, batch)
        run.record(step, update.values)
        run.record_samples(step, batch.seen, update.sums, update.why_not)
        if trouble.calls_for_rollback(config, run, engine, step, batch, update):
            back_to = run.roll_back(engine.load, batches.about_order)
            if back_to >= 0:
                batches.seek(step := back_to)
                continue
        stop = run.told_to_stop()  # one answer for all ranks
        if due(step, config.evaluate_every, config.n_steps):
            last = evaluate(engine, heldout)
            run.record_evaluation(step, last)
        if stop or due(step, config.save_every, config.n_steps):
            run.save(step + 1, engine.save, background=True)
        if stop and step + 1 < config.n_steps:
            run.stopped(step + 1)
        step += 1
    return last


class Trouble:
    """What is said and done about updates that went wrong."""

    def __init__(self) -> None:
        self.bad_in_a_row, self.latest = 0, -1

    def calls_for_rollback(
        self, config: TrainConfig, run: Run, engine: Engine, step: int, batch: TokenBatch, update: Update
    ) -> bool:
        """Tell what went wrong, if anything; the same answer on all ranks. UserError if the run should end."""
        if update.spike:
            run.say(f"step {step}: {update.spike}" + ("" if update.applied else "; its update was left out"))
        if update.bad is None or step in engine.passed_over:
            self.bad_in_a_row = 0 if update.applied and step > self.latest else self.bad_in_a_row
            return False
        self.bad_in_a_row, self.latest = self.bad_in_a_row + 1, step
        where = engine.blame(batch, update)
        run.say(f"step {step}: an Inf or NaN, so its update was left out; {where}")
        too_many = self.bad_in_a_row == MOST_BAD_IN_A_ROW
        if config.on_bad_numbers == "stop" or too_many:
            times = f"{MOST_BAD_IN_A_ROW} updates in a row with" if too_many else "an update with"
            raise UserError(
                f"{times} an Inf or NaN at step {step} ({where}); checkpoints are from before it: go on from them "
                f"with a smaller optim.lr and --allow-change optim.lr"
            )
        if config.on_bad_numbers == "rollback":
            engine.passed_over.add(step)
        return config.on_bad_numbers == "rollback"


def open_tokens(config: TrainConfig, split: str) -> Shards:
    """A split of the folders of shards. Those of a run that has begun may have been damaged since: it survives it."""
    has_begun = bool(found_in(Path(config.out) / "checkpoints"))
    return Shards(open_folders(config.tokens, "tokens", config.cache, whole=not has_begun), "tokens", split)


def warn_of_cut_captions(run: Run, shards: Shards, n_text: int) -> None:
    """Say how many captions the model is too short for."""
    lengths = shards.manifest.counts["captions_by_tokens"]
    if cut := sum(lengths[n_text:]):
        run.say(
            f"{cut} of {len(shards)} captions are longer than model.n_text={n_text} holds and are cut; "
            f"model.n_text={len(lengths)} holds all"
        )


def run_train(config: TrainConfig) -> None:
    """Join the job and train."""
    with joined_place() as place:
        share_cores(place)
        if config.precision == "auto":  # the run's record names what was used
            config = replace(config, precision="bf16" if computes_bf16(place) else "fp32")
        if config.dry_run:
            dry_run(config, place, config.json)
        else:
            train(config, place)


COMMAND = Command("train", TrainConfig, Path(__file__).parent / "configs", run_train, __doc__)

if __name__ == "__main__":
    sys.exit(run_command(COMMAND, sys.argv[1:]))
