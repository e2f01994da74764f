"""Small runs of every stage, and how tests start `smalti`."""

import subprocess
import sys

SMALL_DVAE = [
    "emoji-64", "n_steps=4", "model.width=32", "model.n_init=32", "model.codebook=64", "data.batch=8",
    "schedule.lr_steps=4", "evaluate_every=4", "save_every=2",
]  # fmt: skip
SMALL_TRAIN = [
    "emoji", "n_steps=12", "precision=fp32", "model.n_layers=2", "model.n_heads=2", "model.d_head=16",
    "data.batch=8", "evaluate_every=6", "save_every=3", "optim.warmup_steps=4",
]  # fmt: skip
SMALL_SCORER = ["emoji", "n_steps=4", "data.batch=16", "model.width=8", "evaluate_every=4", "save_every=2"]


def smalti(*words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run `smalti` as a user does, in a process of its own."""
    command = [sys.executable, "-m", "pretrain.cli", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    assert not check or done.returncode == 0, done.stderr[-3000:]
    return done
