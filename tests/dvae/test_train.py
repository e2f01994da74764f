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
from data_pipeline.preprocess import PreprocessConfig, preprocess
from data_pipeline.shards import open_shard
from data_pipeline.sources import EMBEDDED
from dvae.config import DvaeConfig, DvaeTrainConfig, ScheduleConfig
from dvae.likelihood import map_pixels
from dvae.tokenise import TokeniseConfig, tokenise
from dvae.train import open_dvae, train
from tests.pairs import make_pairs
from tests.processes import run_ranks
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


def copy_of(images: Path, copy: Path) -> Path:
    copy.mkdir()
    for path in images.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    return copy


def test_a_cut_image_shard_is_named(data: Path, tmp_path: Path) -> None:
    copy = copy_of(data / "images", tmp_path / "images")
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


def refused_by_two(*words: str) -> list[str]:
    """What two ranks of a job that fails at its start say on stderr: nothing but lines for the user."""
    codes, said = run_ranks([["-m", "dvae.train", *SMALL_DVAE, *words]] * 2)
    assert codes == [1, 1], said
    return [line for _, one in said for line in one.splitlines()]


def test_ranks_without_pictures_end_with_one_line(tmp_path: Path) -> None:
    assert refused_by_two(f"images={tmp_path}/none", f"out={tmp_path}/run") == [
        f"smalti dvae: images folder {tmp_path}/none does not exist; make it with `smalti preprocess`"
    ]


def test_a_damaged_heldout_picture_of_one_rank_ends_all(data: Path, tmp_path: Path) -> None:
    """The last picture is in the share of the last rank."""
    shard = open_shard(sorted(copy_of(data / "images", tmp_path / "images").glob("heldout-*.tar"))[-1])
    offset, size = shard.places[-1]["png"]
    with open(shard.path, "r+b") as file:
        file.seek(offset)
        file.write(bytes(size))
    (line,) = refused_by_two(
        f"images={tmp_path}/images", f"out={tmp_path}/run", "model.image_side=16", "model.fold=4", "data.batch=4"
    )
    assert f"sample {shard.keys[-1]}: png cannot be decoded" in line and line.endswith("(found by rank 1)")


@pytest.mark.parametrize(
    ("stored", "said"), [(16, "all crops of a square one are the same"), (23, "crops differ less"), (24, "")]
)
def test_the_papers_crops_want_pictures_stored_larger(
    tmp_path: Path, stored: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    source = make_pairs(tmp_path / "pairs", 12)
    made = PreprocessConfig(str(source), out=str(tmp_path), image_side=stored, vocab_size=300, heldout_fraction=0.3)
    preprocess(made)
    capsys.readouterr()
    config = settings(tmp_path, tmp_path / "run", n_steps=1, augment="paper")
    train(config, ALONE)
    warnings = [line for line in capsys.readouterr().out.splitlines() if "warning" in line]
    assert len(warnings) == bool(said)
    for line in warnings:
        assert said in line and "image_side=24 and filters.min_side=16" in line
    train(dataclasses.replace(config, out=str(tmp_path / "plain"), augment="none"), ALONE)
    assert "warning" not in capsys.readouterr().out


def test_the_papers_crops_of_pictures_stored_smaller_are_refused(data: Path, tmp_path: Path) -> None:
    wide = dataclasses.replace(MODEL, image_side=32)
    with pytest.raises(FolderError, match=r"16 pixels .* too few for random crops of 32; .* image_side=48 and"):
        train(settings(data, tmp_path / "run", augment="paper", model=wide), ALONE)
