"""The scorer's loss is CLIP's, and its recall counts what it says."""

import dataclasses
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from cluster.metrics import read_metrics
from cluster.run import Run
from cluster.watch import Requeue
from cluster.weights import WEIGHTS
from data_pipeline.loader import LoaderConfig, pad_text
from data_pipeline.order import counter_random
from pretrain.config import ScorerConfig, ScorerTrainConfig
from pretrain.scorer import HeldOut, Scorer, evaluate, shifted, train

CONFIG = ScorerConfig(image_side=16, width=8, n_text=6, n_layers=1, n_heads=1, embed=8)


def scorer() -> Scorer:
    torch.manual_seed(0)
    return Scorer(CONFIG, 20)


def test_the_loss_is_the_symmetric_cross_entropy_of_cosines() -> None:
    net, pixels, text = scorer(), torch.rand(4, 3, 16, 16), pad_text([[1], [2, 3], [4], [5, 6, 7]], 6)
    pictures, texts = net.picture(pixels), net.text(text)
    cosine = torch.stack([F.cosine_similarity(picture[None], texts) for picture in pictures])
    logits = cosine / 0.07
    target = torch.arange(4)
    want = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
    torch.testing.assert_close(net(pixels, text), want)


def test_the_temperature_starts_and_stops_where_clip_has_it() -> None:
    net = scorer()
    assert net.log_scale.item() == pytest.approx(math.log(1 / 0.07))
    pixels, text = torch.rand(4, 3, 16, 16), pad_text([[1], [2], [3], [4]], 6)
    torch.nn.init.constant_(net.log_scale, math.log(100.0))
    at_limit = net(pixels, text).item()
    torch.nn.init.constant_(net.log_scale, 9.0)
    assert net(pixels, text).item() == pytest.approx(at_limit)


def test_a_text_is_read_at_its_last_token_whatever_the_padding() -> None:
    net = scorer()
    short = net.text(pad_text([[1, 2]], 6))
    longer_neighbour = net.text(pad_text([[1, 2], [1, 2, 3, 4, 5]], 6))
    torch.testing.assert_close(short[0], longer_neighbour[0])
    assert not torch.allclose(longer_neighbour[0], longer_neighbour[1])


class Oracle(Scorer):
    """Scores by a given similarity matrix: pictures are unit vectors, texts its rows."""

    def __init__(self, similarity: torch.Tensor) -> None:
        super().__init__(CONFIG, 20)
        self.similarity = similarity

    def embed(self, pixels: torch.Tensor, text: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.eye(len(self.similarity)), self.similarity


def recall(similarity: torch.Tensor) -> float:
    heldout = HeldOut.__new__(HeldOut)
    heldout.pixels = heldout.text = torch.zeros(1)
    return evaluate(Oracle(similarity), heldout, torch.device("cpu"))["val/top5_of_64"]


def test_recall_is_one_for_a_perfect_scorer_and_chance_for_a_blind_one() -> None:
    torch.manual_seed(0)
    assert recall(torch.eye(100)) == 1.0
    assert recall(-torch.eye(100)) == 0.0
    assert recall(torch.randn(100, 100)) == pytest.approx(5 / 64, abs=0.03)


def test_shifts_move_pictures_by_at_most_the_limit() -> None:
    pixels = torch.rand(1, 3, 9, 9).expand(40, -1, -1, -1)
    moved = shifted(pixels, 2, counter_random(0).integers)
    padded = F.pad(pixels[:1], (2,) * 4, mode="replicate")[0]
    allowed = [padded[:, y : y + 9, x : x + 9] for y in range(5) for x in range(5)]
    assert all(any(torch.equal(picture, one) for one in allowed) for picture in moved)
    assert len(moved.unique(dim=0)) > 10
    assert torch.equal(shifted(pixels, 0, counter_random(0).integers), pixels)


def test_a_stopped_run_goes_on_bit_for_bit(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = ScorerTrainConfig(
        images=str(data / "images"), vocab=str(data / "vocab"), out=str(tmp_path / "whole"), n_steps=6,
        evaluate_every=3, save_every=2, model=CONFIG, data=LoaderConfig(batch=8),
    )  # fmt: skip
    train(config)
    asked = iter([False, False, True])
    cut = dataclasses.replace(config, out=str(tmp_path / "cut"))
    with monkeypatch.context() as patch:
        patch.setattr(Run, "told_to_stop", lambda self: next(asked))
        with pytest.raises(Requeue):
            train(cut)
    train(cut)
    whole, resumed = read_metrics(tmp_path / "whole"), read_metrics(tmp_path / "cut")
    assert [r.get("train/loss") for r in whole] == [r.get("train/loss") for r in resumed]
    assert (tmp_path / "cut" / WEIGHTS).read_bytes() == (tmp_path / "whole" / WEIGHTS).read_bytes()
