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

from cluster.command import Command, run_command
from cluster.manifest import refuse_other_origin
from cluster.process import Place, computes_bf16, joined_place, share_cores
from cluster.run import Run, due
from cluster.weights import WEIGHTS
from data_pipeline.bpe import open_vocabulary
from data_pipeline.loader import Shards, TokenBatches
from pretrain.config import TrainConfig
from pretrain.engine import build_engine
from pretrain.evaluate import HeldOut, evaluate
from pretrain.model import Sizes


def train(config: TrainConfig, place: Place) -> None:
    """Run the stage; see the module's text."""
    vocabulary, vocab = open_vocabulary(Path(config.vocab))
    shards = Shards(Path(config.tokens), "tokens", "train")
    about = shards.manifest
    refuse_other_origin(Path(config.tokens), about, "vocab", Path(config.vocab), vocab)
    made_from = {"tokens": about.fingerprint, "dvae": about.made_from["dvae"], "vocab": vocab}
    run = Run(config, "transformer", ("tokens", "vocab"), made_from, place)
    if run.is_finished:
        run.say("finished already")
        return
    cut = sum(about.counts["captions_by_tokens"][config.model.n_text :])
    if cut:
        longest = len(about.counts["captions_by_tokens"]) - 1
        run.say(
            f"{cut} of {len(shards)} captions are longer than model.n_text={config.model.n_text} holds and are cut; "
            f"model.n_text={longest + 1} holds all"
        )
    sizes = Sizes(vocabulary.size, about.counts["codebook"], about.counts["grid"])
    heldout = HeldOut(Shards(Path(config.tokens), "tokens", "heldout"), vocabulary, config.model.n_text)
    engine = build_engine(config, sizes, place)
    batches = TokenBatches(
        shards, config.data, vocabulary, config.model.n_text, config.bpe_dropout, config.caption_dropout,
        place.rank, place.world_size,
    )  # fmt: skip
    first = run.begin(engine.load)
    batches.seek(first)
    last: dict[str, float] = {}
    for step in range(first, config.n_steps):
        run.record(step, engine.step(step, next(batches)))
        stop = run.told_to_stop()  # one answer for all ranks
        if due(step, config.evaluate_every, config.n_steps):
            last = evaluate(engine, heldout)
            run.record_evaluation(step, last)
        if stop or due(step, config.save_every, config.n_steps):
            run.save(step + 1, engine.save)
        if stop and step + 1 < config.n_steps:
            run.stopped(step + 1)
    engine.release(run.folder)
    run.finish(
        {"steps": config.n_steps} | (last or evaluate(engine, heldout)),
        {"model_type": "smalti-transformer", **asdict(config.model), **asdict(sizes)},
        [WEIGHTS],
    )
    run.close()


def run_train(config: TrainConfig) -> None:
    """Join the job and train."""
    with joined_place() as place:
        share_cores(place)
        if config.precision == "auto":  # the run's record names what was used
            config = replace(config, precision="bf16" if computes_bf16(place) else "fp32")
        train(config, place)


COMMAND = Command("train", TrainConfig, Path(__file__).parent / "configs", run_train, __doc__)

if __name__ == "__main__":
    sys.exit(run_command(COMMAND, sys.argv[1:]))
