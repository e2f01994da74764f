"""A tiny set carried through the first stages once, for the tests of the later ones."""

import subprocess
import sys
from pathlib import Path

import pytest

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


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data/images, data/vocab, data/tokens and runs/dvae of the held-out emoji."""
    folder = tmp_path_factory.mktemp("tiny")
    smalti(
        "preprocess", "emoji", "source=emoji:heldout", "heldout_source=", "heldout_fraction=0.2", "vocab_size=600",
        f"out={folder}/data",
    )  # fmt: skip
    images, vocab = f"images={folder}/data/images", f"vocab={folder}/data/vocab"
    smalti("dvae", *SMALL_DVAE, images, f"out={folder}/runs/dvae")
    smalti("tokenise", images, vocab, f"dvae={folder}/runs/dvae", f"out={folder}/data/tokens")
    return folder


@pytest.fixture
def train_words(tiny: Path) -> list[str]:
    """Words of a small training run on the tiny set, all but `out`."""
    return [*SMALL_TRAIN, f"tokens={tiny}/data/tokens", f"vocab={tiny}/data/vocab"]
