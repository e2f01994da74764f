"""A dry run tells what a run would be, from shapes alone."""

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from cluster.process import Place
from cluster.settings import SettingError
from pretrain.config import TrainConfig
from pretrain.dry_run import dry_run
from pretrain.engine_start import deepspeed_settings
from pretrain.train import COMMAND


def told(config: TrainConfig, place: Place, capsys: pytest.CaptureFixture[str]) -> dict:
    dry_run(config, place, as_json=True)
    return json.loads(capsys.readouterr().out)


def place_of(world_size: int) -> Place:
    return Place(0, world_size, torch.device("cpu"))


@pytest.fixture
def preset(tmp_path: Path) -> TrainConfig:
    return COMMAND.settings(["dalle-12b", f"tokens={tmp_path}/none"])


def test_the_papers_run_is_told_without_data_group_or_memory(
    preset: TrainConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    found = told(preset, place_of(1), capsys)
    assert not dist.is_initialized()
    assert found["sizes"] == {"text_vocab": 16_384, "codebook": 8_192, "grid": 32, "from_data": False}
    assert found["parameters"]["kinds"]["resblock matrices"] == 12_092_178_432
    assert found["shards"] == {"groups": 1, "ranks": 8, "numel": found["shards"]["numel"]}
    assert found["power_sgd"]["shard_ranks"] == [112]
    assert round(found["power_sgd"]["saved"], 2) == 0.86
    assert found["deepspeed"] == deepspeed_settings(preset, 8)


def test_resblocks_are_summarised_by_what_they_are(preset: TrainConfig, capsys: pytest.CaptureFixture[str]) -> None:
    d = 3968
    rows = told(preset, place_of(1), capsys)["resblocks"]
    assert [(row["kind"], row["count"], row["numel"]) for row in rows] == [
        ("attention", 64, 4 * d**2 + 6 * d),
        ("mlp", 64, 8 * d**2 + 7 * d),
    ]
    assert all(row["shard"] * 8 == row["numel"] for row in rows)


def test_the_launchers_ranks_decide_the_groups(preset: TrainConfig, capsys: pytest.CaptureFixture[str]) -> None:
    assert told(preset, place_of(1024), capsys)["shards"]["groups"] == 128
    with pytest.raises(SettingError, match="12 processes"):
        told(preset, place_of(12), capsys)


def test_sizes_are_those_of_the_data_where_there_is_some(
    tiny: Path, train_words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = told(COMMAND.settings(train_words), place_of(1), capsys)["sizes"]
    assert sizes == {"text_vocab": 600, "codebook": 64, "grid": 8, "from_data": True}


def test_the_tiny_preset_uses_every_device_of_the_large_one(preset: TrainConfig) -> None:
    """They differ in sizes, lengths and counts, never in what is switched on."""
    sized = {"n_steps", "zero_shards", "evaluate_every", "save_every", "keep_every", "model", "data", "tokens"}
    tiny = COMMAND.settings(["dalle-12b-tiny"])
    for name in vars(preset).keys() - sized - {"optim", "power_sgd"}:
        assert getattr(preset, name) == getattr(tiny, name), name
    for section, own in (("optim", {"warmup_steps"}), ("power_sgd", {"rank"})):
        large, small = vars(getattr(preset, section)), vars(getattr(tiny, section))
        assert {key for key in large if large[key] != small[key]} == own


def test_the_text_has_what_the_json_has(preset: TrainConfig, capsys: pytest.CaptureFixture[str]) -> None:
    dry_run(preset, place_of(8))
    text = capsys.readouterr().out
    for part in ("12,292,840,960", "64 x attention", "1 groups of 8 ranks", "rank 112 a shard, 85.9% saved",
                 "float32 masters", '"stage": 3', "there is no data yet"):  # fmt: skip
        assert part in text
