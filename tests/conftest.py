"""Fixtures of all tests: one thread, one process, and a few tiny image-caption pairs."""

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from cluster.process import Place
from cluster.watch import SIGNALS
from data_pipeline.preprocess import PreprocessConfig, preprocess
from tests.pairs import make_pairs

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def own_signals() -> Iterator[None]:
    """A run listens for signals; give pytest its own back."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def place() -> Place:
    return Place(0, 1, torch.device("cpu"))


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    """A folder of 12 loose pictures with a .txt beside each."""
    return make_pairs(tmp_path / "pairs", 12)


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What preprocess makes of 29 pairs: shards of at most 5, some held out, and a vocabulary. Not to be changed."""
    folder = tmp_path_factory.mktemp("data")
    source = make_pairs(folder / "pairs", 29)
    preprocess(
        PreprocessConfig(
            source=str(source),
            out=str(folder / "out"),
            image_side=16,
            image_format="png",
            samples_per_shard=5,
            heldout_fraction=0.2,
            vocab_size=320,
        )
    )
    return folder / "out"
