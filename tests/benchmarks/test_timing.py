"""How a peer is timed: on what rows its linear layers stand alone, and where its sampling is stopped."""

import importlib
import importlib.util
import json
import sys
import time

import pytest
import torch
from torch import Tensor, nn

from benchmarks.timing import GRID, MOST_TOKENS, N_TEXT, PREFIX, Peer, TrainingStep, hollow_out, sample_row


class Tiny(nn.Module):
    """One linear layer over all slots, one over the picture's, one that is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.everywhere, self.head, self.idle = nn.Linear(2, 3), nn.Linear(3, 5), nn.Linear(3, 3)

    def forward(self, text: Tensor, image: Tensor) -> Tensor:
        x = torch.cat((text, image), dim=1)[..., None].float().expand(-1, -1, 2)
        return self.head(self.everywhere(x)[:, text.shape[1] :])


def one_by_one(model: nn.Module, text: Tensor, image: Tensor) -> None:
    """Costs more on the pass that reads the prefix than on those that follow."""
    if image.shape[1] == PREFIX:
        start = time.process_time()
        while time.process_time() - start < 0.2:
            pass
    while image.shape[1] < GRID**2:
        model(text, image)
        image = torch.cat((image, image[:, :1]), dim=1)


TINY = Peer(lambda _: Tiny(), lambda m, text, image: m(text, image).square().mean(), {"sample": one_by_one})


def test_linear_layers_stand_alone_on_the_rows_that_they_were_given() -> None:
    step = TrainingStep(TINY, 3)
    step.count_rows()
    names = {module: name for name, module in step.model.named_modules()}
    assert {names[linear]: rows for linear, rows in step.rows.items()} == {
        "everywhere": 3 * (N_TEXT + GRID**2), "head": 3 * GRID**2,
    }  # fmt: skip
    step.linears_alone()
    trained = {name for name, parameter in step.model.named_parameters() if parameter.grad is not None}
    assert trained == {"everywhere.weight", "everywhere.bias", "head.weight", "head.bias"}


def test_sampling_is_stopped_early_and_the_pass_that_reads_the_prefix_does_not_count() -> None:
    row = sample_row(TINY, "sample", 2)
    assert row["tokens"] == MOST_TOKENS
    assert row["ours"] < 0.2 / MOST_TOKENS  # had the first pass counted, the mean would be above
    assert row["ratio"] == pytest.approx(row["theirs"] / row["ours"])


def test_sampling_that_ends_before_it_is_stopped_is_an_error() -> None:
    brief = Peer(TINY.build, TINY.loss, {"sample": lambda model, text, image: model(text, image)})
    with pytest.raises(RuntimeError, match="sample ended after 0 codes"):
        sample_row(brief, "sample", 1)


def test_a_hollow_module_can_be_imported_from_and_inherited_from() -> None:
    before = set(sys.modules)
    try:
        hollow_out("no_such_package.deep.inside", "json")
        deep = importlib.import_module("no_such_package.deep.inside")
        assert type("Child", (deep.Anything,), {}).__mro__[1].__name__ == "Anything"
        assert importlib.util.find_spec("no_such_package") is not None
        assert sys.modules["json"] is json  # what is there stays
    finally:
        for name in set(sys.modules) - before:
            del sys.modules[name]
