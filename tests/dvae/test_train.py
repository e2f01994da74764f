"""Training the discrete VAE and tokenising with it: resumed equals undisturbed, and wrong input is named."""

import dataclasses
import gzip
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cluster.manifest import FolderError, read_manifest
from cluster.metrics import read_metrics
from cluster.process import Place
from cluster.run import Run
from cluster.watch import Requeue
from cluster.weights import WEIGHTS
from data_pipeline.loader import Shards, picture_of, to_pixels
from data_pipeline.shards import open_shard
from data_pipeline.sources import EMBEDDED
from dvae.config import DvaeConfig, DvaeTrainConfig, ScheduleConfig
from dvae.likelihood import map_pixels
from dvae.tokenise import TokeniseConfig, tokenise
from dvae.train import open_dvae, train
from tests.small import SMALL_DVAE, smalti

ALONE = Place(0, 1, torch.device("cpu"))
MODEL = DvaeConfig(image_side=16, fold=4, width=16, n_groups=1, n_blocks=1, n_init=16, codebook=32)


def settings(data: Path, out: Path, **changes: Any) -> DvaeTrainConfig:
    config = DvaeTrainConfig(
        images=str(data / "images"), out=str(out), n_steps=6, evaluate_every=3, save_every=2, start="seeded",
        min_log_scale=-1.5, model=MODEL, schedule=ScheduleConfig(lr=1e-3, lr_steps=6, temperature_steps=6, kl_steps=3),
    )  # fmt: skip
    return dataclasses.replace(config, **changes)


@pytest.fixture(scope="module")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dvae") / "run"
    train(settings(data, out), ALONE)
    return out


def training_losses(run: Path) -> list[float]:
    return [record["train/loss"] for record in read_metrics(run) if "train/loss" in record]


def test_a_stopped_run_goes_on_bit_for_bit(
    data: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, asked = tmp_path / "run", iter([False, False, True])
    with monkeypatch.context() as patch:
        patch.setattr(Run, "told_to_stop", lambda self: next(asked))
        with pytest.raises(Requeue):
            train(settings(data, out), ALONE)
    assert len(training_losses(out)) == 3
    train(settings(data, out), ALONE)
    assert training_losses(out) == training_losses(trained)
    assert (out / WEIGHTS).read_bytes() == (trained / WEIGHTS).read_bytes()


def test_code_usage_is_logged_from_the_first_step(trained: Path) -> None:
    first = next(record for record in read_metrics(trained) if "train/loss" in record)
    assert first["step"] == 0
    assert 0 < first["vae/codes_used_in_batch"] <= 1 <= first["vae/perplexity_in_batch"]


def test_a_run_with_other_settings_is_refused_by_name(data: Path, trained: Path) -> None:
    with pytest.raises(FolderError, match=r"weight_decay: 0.0001 there, 0.5 here"):
        train(settings(data, trained, weight_decay=0.5), ALONE)


def test_tokens_are_the_codes_of_the_pictures(data: Path, trained: Path, tmp_path: Path) -> None:
    tokenise(TokeniseConfig(str(data / "images"), str(data / "vocab"), str(trained), str(tmp_path / "tokens"), batch=2))
    model, about = open_dvae(trained, torch.device("cpu"))
    manifest = read_manifest(tmp_path / "tokens", "tokens")
    assert manifest.made_from["dvae"] == about.fingerprint
    images, tokens = Shards(data / "images", "images", "train"), Shards(tmp_path / "tokens", "tokens", "train")
    assert len(images) == len(tokens) == manifest.counts["train"] == sum(manifest.counts["captions_by_tokens"])
    for picture, coded in zip(images, tokens, strict=True):
        assert picture.key == coded.key and picture.files["txt"] == coded.files["txt"]
        path = tmp_path / "codes.npy"
        path.write_bytes(coded.files["npy"])
        codes = np.load(path)
        assert codes.dtype == np.uint16 and codes.shape == (1, 4, 4)
        mapped = map_pixels(to_pixels(picture_of(picture, 16)[None])).contiguous(memory_format=torch.channels_last)
        logits = model.encoder(mapped)[0]
        chosen = logits.gather(0, torch.from_numpy(codes.astype(np.int64)))
        rounding = 4 * torch.finfo(torch.float32).eps * logits.abs().max()  # plain patches tie between two codes
        assert (logits.amax(0) - chosen[0]).max() <= rounding


def test_an_unfinished_token_folder_keeps_its_finished_shards(data: Path, trained: Path, tmp_path: Path) -> None:
    config = TokeniseConfig(str(data / "images"), str(data / "vocab"), str(trained), str(tmp_path / "tokens"))
    tokenise(config)
    whole = {path.name: path.read_bytes() for path in (tmp_path / "tokens").iterdir()}
    (tmp_path / "tokens" / "manifest.json").unlink()
    lost, kept = sorted((tmp_path / "tokens").glob("*.tar"))[:2]
    lost.with_suffix(".json").unlink()
    before = kept.stat().st_mtime_ns
    tokenise(config)
    assert {path.name: path.read_bytes() for path in (tmp_path / "tokens").iterdir()} == whole
    assert kept.stat().st_mtime_ns == before


def test_an_unfinished_token_folder_is_not_mixed_with_another_dvae(data: Path, trained: Path, tmp_path: Path) -> None:
    config = TokeniseConfig(str(data / "images"), str(data / "vocab"), str(trained), str(tmp_path / "tokens"))
    tokenise(config)
    (tmp_path / "tokens" / "manifest.json").unlink()
    train(settings(data, tmp_path / "other", seed=1), ALONE)
    with pytest.raises(FolderError, match="another dvae"):
        tokenise(dataclasses.replace(config, dvae=str(tmp_path / "other")))


def test_a_cut_image_shard_is_named(data: Path, tmp_path: Path) -> None:
    copy = tmp_path / "images"
    copy.mkdir()
    for path in (data / "images").iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    shard = sorted(copy.glob("train-*.tar"))[0]
    shard.write_bytes(shard.read_bytes()[:2048])
    with pytest.raises(FolderError, match=shard.name):
        train(settings(tmp_path, tmp_path / "run"), ALONE)
    assert open_shard(sorted(copy.glob("train-*.tar"))[1])


def test_tars_of_others_are_trained_on_without_preprocess(tmp_path: Path) -> None:
    for name in ("train-00000", "heldout-00000"):
        (tmp_path / f"{name}.tar").write_bytes(gzip.decompress((EMBEDDED / f"{name}.tar.gz").read_bytes()))
    words = [f"images={tmp_path}/train-00000.tar", f"heldout_images={tmp_path}/heldout-00000.tar", "n_steps=2"]
    smalti("dvae", *SMALL_DVAE, *words, f"out={tmp_path}/run")
    assert len(list((tmp_path / "run" / "indexes").iterdir())) == 2
    losses = [training_losses(tmp_path / "run")]
    for changes in ("augment=paper", "flip=false"):
        out = tmp_path / changes
        smalti("dvae", *SMALL_DVAE, *words, changes, f"out={out}")
        losses.append(training_losses(out))
    assert len({one[0] for one in losses}) == 3  # other pixels from the first step on
    proved = smalti("ledger", f"{tmp_path}/run", check=False)
    assert proved.returncode == 0, proved.stdout + proved.stderr
