"""The `smalti` command: one verb a stage, in the order they are run.

A verb is one word or two (`dvae import`). Each verb is also `python -m MODULE` with the same words.
"""

import importlib
import sys

from cluster.command import Command, run_command
from cluster.watch import INTERRUPTED

VERBS = {
    "preprocess": "data_pipeline.preprocess",
    "preprocess merge": "data_pipeline.merge",
    "dvae": "dvae.train",
    "dvae import": "dvae.openai_import",
    "dvae export": "dvae.openai_export",
    "tokenise": "dvae.tokenise",
    "tokenise merge": "dvae.tokenise_merge",
    "train": "pretrain.train",
    "scorer": "pretrain.scorer",
    "sample": "pretrain.sample",
    "rerank": "pretrain.rerank",
    "checkpoint": "cluster.inspect_checkpoints",
    "checkpoint export": "pretrain.export",
    "checkpoint diff": "pretrain.checkpoint_diff",
    "ledger": "data_pipeline.proof",
    "plot": "pretrain.plot",
    "plan": "pretrain.plan",
    "launch local": "pretrain.launch_local",
    "launch hostfile": "pretrain.launch_hostfile",
    "launch slurm": "pretrain.launch_slurm",
    "doctor": "pretrain.doctor",
    "pipeline slurm": "pretrain.pipeline",
    "status": "pretrain.status",
    "drill": "pretrain.drill",
    "demo": "pretrain.demo",
}


def main() -> int:
    """Run `smalti VERB words...`; returns the exit code."""
    verb, words = split_verb(sys.argv[1:] or ["--help"])
    if verb in ("--help", "-h", "help"):
        print(_overview())
        return 0
    if verb not in VERBS:
        print(f"smalti: {verb!r} is no verb; there are: {', '.join(VERBS)} (see `smalti --help`)", file=sys.stderr)
        return 2
    try:
        command = command_of(verb)
    except KeyboardInterrupt:  # importing torch takes a second or two
        return INTERRUPTED
    return run_command(command, words)


def command_of(verb: str) -> Command:
    """The entry point of a verb that is listed."""
    command: Command = importlib.import_module(VERBS[verb]).COMMAND
    return command


def split_verb(words: list[str]) -> tuple[str, list[str]]:
    """The verb that a non-empty list of words begins with, and the rest; two words where they name one."""
    two = " ".join(words[:2])
    return (two, words[2:]) if two in VERBS else (words[0], words[1:])


def _overview() -> str:
    lines = ["smalti VERB [PRESET | FILE.toml] [key=value ...]      smalti VERB --help\n"]
    for verb in VERBS:
        lines.append(f"  {verb:<17} {command_of(verb).about.strip().splitlines()[0]}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
