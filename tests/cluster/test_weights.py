"""A release is read whole, or refused in one line that says what does not fit."""

from pathlib import Path

import pytest
import torch
from torch import nn

from cluster.manifest import FolderError
from cluster.weights import WEIGHTS, load_weights, save_weights


def test_weights_come_back_as_they_were(tmp_path: Path) -> None:
    saved, loaded = nn.Linear(3, 4), nn.Linear(3, 4)
    save_weights(tmp_path, saved.state_dict())
    load_weights(tmp_path, loaded)
    assert torch.equal(saved.weight, loaded.weight) and torch.equal(saved.bias, loaded.bias)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (nn.Linear(3, 5), r"2 of 2 weights \(bias is \(4,\) there and \(5,\) here\)"),
        (nn.Linear(3, 4, bias=False), r"1 of 2 weights \(bias is \(4,\) there and missing here\)"),
        (nn.Sequential(nn.Linear(3, 4)), r"4 of 4 weights \(0.bias is missing there and \(4,\) here\)"),
    ],
)
def test_weights_of_another_model_are_refused_naming_the_first_that_differs(
    tmp_path: Path, model: nn.Module, words: str
) -> None:
    save_weights(tmp_path, nn.Linear(3, 4).state_dict())
    before = [parameter.clone() for parameter in model.parameters()]
    with pytest.raises(FolderError, match=words) as raised:
        load_weights(tmp_path, model)
    assert "\n" not in str(raised.value) and str(tmp_path / WEIGHTS) in str(raised.value)
    assert all(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize("kept", [0, 5, 40])
def test_a_cut_or_missing_file_is_refused(tmp_path: Path, kept: int) -> None:
    with pytest.raises(FolderError, match="cannot be read"):
        load_weights(tmp_path, nn.Linear(3, 4))
    save_weights(tmp_path, nn.Linear(3, 4).state_dict())
    (tmp_path / WEIGHTS).write_bytes((tmp_path / WEIGHTS).read_bytes()[:kept])
    with pytest.raises(FolderError, match="cannot be read"):
        load_weights(tmp_path, nn.Linear(3, 4))
