"""Token shards: shared by tasks, killed and raced they are the same bytes; several random crops of each picture."""

import dataclasses
import hashlib
import random
import signal
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from cluster.command import run_command
from cluster.manifest import FolderError, read_manifest, temporary, write_manifest
from cluster.settings import SettingError
from cluster.weights import WEIGHTS, save_weights
from data_pipeline.augment import transformer_crop
from data_pipeline.bpe import open_vocabulary
from data_pipeline.contents import read_npy
from data_pipeline.convert import PreprocessConfig
from data_pipeline.folders import Shards
from data_pipeline.images import decode
from data_pipeline.loader import LoaderConfig, TokenBatches
from data_pipeline.order import AUGMENT, counter_random
from data_pipeline.preprocess import preprocess
from data_pipeline.shards import open_shard
from dvae.config import DvaeConfig
from dvae.model import Dvae
from dvae.tokenise import TokeniseConfig, encode, merge, tokenise
from dvae.tokenise_merge import COMMAND as MERGE
from dvae.train import open_dvae
from tests.pairs import caption, encoded, tree, write_tar
from tests.processes import ended, in_child

SIDE = 16
SMALL = ("06", "07")  # pictures whose short side is below it: all of a shard


def scene(seed: int, size: tuple[int, int]) -> bytes:
    """A picture of its own, of large shapes."""
    cells = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), np.uint8)
    return encoded(Image.fromarray(cells).resize(size, Image.Resampling.BICUBIC), "png")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """images/ of 5 shards of 2 pictures, those of one too small to be cropped; vocab/; an untrained dvae/."""
    folder = tmp_path_factory.mktemp("made")
    for tar in range(5):
        members = []
        for n in (2 * tar, 2 * tar + 1):
            size = (30, SIDE - 1) if f"{n:02d}" in SMALL else (30, 24)
            members += [(f"{n:02d}.txt", caption(n).encode()), (f"{n:02d}.png", scene(n, size))]
        write_tar(folder / "raw" / f"{tar}.tar", members)
    write_tar(folder / "held.tar", [("h.txt", caption(20).encode()), ("h.png", scene(20, (24, 30)))])
    preprocess(
        PreprocessConfig(
            source=str(folder / "raw"), heldout_source=str(folder / "held.tar"), out=str(folder), image_format="png",
            vocab_size=290,
        )
    )  # fmt: skip
    shape = DvaeConfig(image_side=SIDE, fold=4, width=16, n_groups=1, n_blocks=1, n_init=16, codebook=32)
    torch.manual_seed(0)
    (folder / "dvae").mkdir()
    save_weights(folder / "dvae", Dvae(shape).state_dict())
    write_manifest(folder / "dvae", "dvae", {"model": asdict(shape)}, {}, [WEIGHTS], {})
    return folder


def config_of(made: Path, out: Path, **changes: Any) -> TokeniseConfig:
    config = TokeniseConfig(str(made / "images"), str(made / "vocab"), str(made / "dvae"), str(out), batch=3)
    return dataclasses.replace(config, **changes)


CROPPED: dict[str, Any] = {"augment": "transformer", "crops": 4}


@pytest.fixture(scope="module", params=["center", "crops"])
def whole(request: pytest.FixtureRequest, made: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Settings, and every file that one process writes with them."""
    changes = CROPPED if request.param == "crops" else {}
    out = tmp_path_factory.mktemp("whole")
    tokenise(config_of(made, out, **changes))
    return changes, tree(out)


def codes(out: Path, split: str = "train") -> dict[str, np.ndarray]:
    return {sample.key: read_npy(sample.files["npy"]) for sample in Shards(out, "tokens", split)}


@pytest.mark.parametrize("tasks", [1, 2, 4, 8])
def test_tasks_give_the_bytes_of_one_process(made: Path, whole: Any, tmp_path: Path, tasks: int) -> None:
    changes, files = whole
    for task in reversed(range(tasks)):
        tokenise(config_of(made, tmp_path, tasks=tasks, task=task, **changes))
    assert not (tmp_path / "manifest.json").exists()
    merge(config_of(made, tmp_path, tasks=tasks, **changes))
    assert tree(tmp_path) == files
    tokenise(config_of(made, tmp_path, tasks=tasks, task=0, **changes))
    assert tree(tmp_path) == files


@pytest.mark.parametrize("seed", range(3))
def test_a_task_killed_at_any_byte_and_rerun_gives_the_same_bytes(
    made: Path, whole: Any, tmp_path: Path, seed: int
) -> None:
    changes, files = whole
    smallest = min(len(content) for name, content in files.items() if name.endswith(".tar"))
    limit = random.Random(seed).randrange(1, smallest)
    config = config_of(made, tmp_path, tasks=2, task=1, **changes)
    assert ended(in_child(lambda: tokenise(config), limit)) == -signal.SIGXFSZ
    with pytest.raises(FolderError, match="6 of 6 shards are not made"):
        merge(config)
    for task in (0, 1):
        tokenise(dataclasses.replace(config, task=task))
    temporary(tmp_path / "train-000001.tar").write_bytes(b"of a task that began when another had done its part")
    merge(config)
    assert tree(tmp_path) == files


def test_tasks_that_race_on_the_same_shards_give_the_same_bytes(made: Path, whole: Any, tmp_path: Path) -> None:
    changes, files = whole
    configs = [config_of(made, tmp_path, tasks=2, task=task, **changes) for task in (0, 1, 0, 1, 0)]
    children = [in_child(lambda c=config: tokenise(c)) for config in configs]  # type: ignore[misc]
    children[-1].kill()
    assert [ended(child) for child in children[:-1]] == [0] * 4 and ended(children[-1]) in (0, -signal.SIGKILL)
    merge(configs[0])
    assert tree(tmp_path) == files


def test_a_gap_is_refused_by_name_and_with_the_command(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for task in (0, 2):
        tokenise(config_of(made, tmp_path, tasks=3, task=task))
    words = [f"images={made}/images", f"vocab={made}/vocab", f"dvae={made}/dvae", f"out={tmp_path}", "tasks=3"]
    capsys.readouterr()
    assert run_command(MERGE, words) == 1
    assert capsys.readouterr().err == (
        "smalti tokenise merge: 2 of 6 shards are not made: train-000001.tar, train-000004.tar; "
        "run `smalti tokenise` with the same words tasks=3 and task=1\n"
    )
    tokenise(config_of(made, tmp_path, tasks=3, task=1))
    (tmp_path / "train-000002.tar").write_bytes(b"cut")
    with pytest.raises(FolderError, match=r"1 of 6 shards are not made: train-000002\.tar; .* task=2$"):
        merge(config_of(made, tmp_path, tasks=3))


def test_crops_are_those_of_the_recipe_and_each_is_its_own(made: Path, tmp_path: Path) -> None:
    tokenise(config_of(made, tmp_path, **CROPPED))
    manifest = read_manifest(tmp_path, "tokens")
    assert manifest.counts["crops"] == 4 and manifest.settings == {"augment": "transformer", "crops": 4, "seed": 0}
    found = codes(tmp_path)
    assert all(grids.shape == (4, 4, 4) and grids.dtype == np.uint16 for grids in found.values())
    assert sum(len(np.unique(grids, axis=0)) > 1 for grids in found.values()) >= 6  # nearly all of the 8 differ
    model, _ = open_dvae(made / "dvae", torch.device("cpu"))
    for sample in Shards(made / "images", "images", "train"):
        if sample.key in SMALL:
            continue
        image = decode(sample.files["png"], 10**6)
        crops = [
            transformer_crop(image, SIDE, counter_random(0, AUGMENT, first_8_bytes(sample.key), crop))
            for crop in range(4)
        ]
        same = (encode(np.stack(crops), model, torch.device("cpu")) == found[sample.key]).mean()
        assert same > 0.9, sample.key  # plain patches may tie between two codes


@pytest.mark.parametrize(
    ("stored", "said"), [(16, "all crops of a square one are the same"), (17, "crops differ less"), (18, "")]
)
def test_crops_want_pictures_stored_larger(
    made: Path, tmp_path: Path, stored: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    images = stored_with(made, tmp_path, stored)
    for changes in ({}, CROPPED):
        capsys.readouterr()
        tokenise(config_of(made, tmp_path / f"{len(changes)}", images=str(images), **changes))
        warnings = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: pictures are")]
        assert len(warnings) == bool(said and changes)
        for line in warnings:
            assert said in line and "image_side=18 and filters.min_side=16" in line


def test_crops_of_pictures_stored_smaller_are_refused(made: Path, tmp_path: Path) -> None:
    images = str(stored_with(made, tmp_path, 15))
    with pytest.raises(FolderError, match="15 pixels .* too few for random crops of 16; .* image_side=18 and"):
        tokenise(config_of(made, tmp_path / "tokens", images=images, **CROPPED))
    assert not (tmp_path / "tokens").exists()


def stored_with(made: Path, folder: Path, side: int) -> Path:
    """The pictures of `made`, stored with that image_side."""
    preprocess(
        PreprocessConfig(
            source=str(made / "raw"), heldout_fraction=0.0, out=str(folder), image_side=side, image_format="png",
            vocab_size=290,
        )
    )  # fmt: skip
    return folder / "images"


def first_8_bytes(key: str) -> int:
    return int(hashlib.sha256(key.encode()).hexdigest()[:16], 16)


def test_crops_depend_on_key_and_seed_alone(made: Path, tmp_path: Path) -> None:
    """More crops, other batches: the first ones stay what they were."""
    tokenise(config_of(made, tmp_path / "a", **CROPPED))
    tokenise(config_of(made, tmp_path / "b", augment="transformer", crops=6, batch=128))
    tokenise(config_of(made, tmp_path / "c", seed=1, **CROPPED))
    a, b, c = (codes(tmp_path / name) for name in "abc")
    assert np.mean([np.mean(b[key][:4] == a[key]) for key in a]) > 0.97  # batches may round ties otherwise
    assert any((c[key] != a[key]).any() for key in a)


def test_pictures_too_small_to_be_cropped_are_left_out_and_counted(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where that leaves nothing of a shard."""
    tokenise(config_of(made, tmp_path / "crops", **CROPPED))
    assert "2 pictures are left out: their short side is below the dVAE's 16 pixels" in capsys.readouterr().out
    manifest = read_manifest(tmp_path / "crops", "tokens")
    assert manifest.counts["too_small"] == 2 and manifest.counts["train"] == 8 and manifest.counts["heldout"] == 1
    assert sum(manifest.counts["captions_by_tokens"]) == 8
    assert codes(tmp_path / "crops").keys() == {f"{n:02d}" for n in range(10)} - set(SMALL)
    assert "train-000003.tar" not in manifest.files and len(manifest.files) == 5
    tokenise(config_of(made, tmp_path / "center"))
    whole = read_manifest(tmp_path / "center", "tokens").counts
    assert whole["train"] == 10 and "too_small" not in whole


def test_nothing_but_small_pictures_is_refused(made: Path, tmp_path: Path) -> None:
    write_tar(tmp_path / "raw.tar", [
        (f"{n}.{end}", data) for n in range(4)
        for end, data in (("png", scene(n, (20, 12))), ("txt", caption(n).encode()))
    ])  # fmt: skip
    preprocess(PreprocessConfig(source=str(tmp_path / "raw.tar"), out=str(tmp_path), vocab_size=280,
                                heldout_fraction=0.0))  # fmt: skip
    config = config_of(made, tmp_path / "tokens", images=str(tmp_path / "images"), **CROPPED)
    with pytest.raises(FolderError, match="no training picture of .* has 16 pixels along its short side"):
        tokenise(config)


def test_training_draws_a_crop_at_each_visit(made: Path, tmp_path: Path) -> None:
    tokenise(config_of(made, tmp_path, **CROPPED))
    shards = Shards(tmp_path, "tokens", "train")
    vocabulary, _ = open_vocabulary(made / "vocab")
    batches = TokenBatches(shards, LoaderConfig(batch=8), vocabulary, 16, 0.0)
    grids, seen = codes(tmp_path), {}  # type: ignore[var-annotated]
    for step in range(40):
        batch = batches.read(step)
        for key, image in zip(batch.keys, batch.image.numpy(), strict=True):
            drawn = [n for n, grid in enumerate(grids[key]) if np.array_equal(grid.ravel(), image)]
            assert drawn
            seen.setdefault(key, set()).update(drawn)
    assert all(numbers == {0, 1, 2, 3} for numbers in seen.values()) and len(seen) == 8


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"crops": 2}, "crops=2 needs augment=transformer"),
        ({"crops": 0}, "crops=0 must be at least 1"),
        ({"tasks": 2, "task": 2}, "task=2 must be from 0 to tasks-1"),
    ],
)
def test_settings_that_make_no_sense_are_refused(
    made: Path, tmp_path: Path, changes: dict[str, int], said: str
) -> None:
    with pytest.raises(SettingError, match=said):
        config_of(made, tmp_path, **changes)


def test_other_crops_are_not_mixed_into_a_folder(made: Path, tmp_path: Path) -> None:
    tokenise(config_of(made, tmp_path, tasks=2, task=0))
    with pytest.raises(FolderError, match="was begun with another dvae, images, vocab, crops or precision"):
        tokenise(config_of(made, tmp_path, tasks=2, task=1, **CROPPED))
    tokenise(config_of(made, tmp_path))
    with pytest.raises(FolderError, match="crops: None there, 4 here"):
        tokenise(config_of(made, tmp_path, **CROPPED))


def test_a_shard_that_lost_its_record_is_made_again(made: Path, tmp_path: Path) -> None:
    tokenise(config_of(made, tmp_path))
    whole = tree(tmp_path)
    (tmp_path / "manifest.json").unlink()
    (tmp_path / "train-000001.done.json").unlink()
    (tmp_path / "train-000002.json").unlink()
    kept = (tmp_path / "train-000000.tar").stat().st_mtime_ns
    tokenise(config_of(made, tmp_path))
    assert tree(tmp_path) == whole and (tmp_path / "train-000000.tar").stat().st_mtime_ns == kept
    assert len(open_shard(tmp_path / "train-000001.tar")) == 2
