"""A tiny set carried through the first stages once, for the tests of the later ones."""

from pathlib import Path

import pytest

from tests.small import SMALL_DVAE, SMALL_TRAIN, smalti


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
