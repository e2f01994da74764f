"""Copies are taken out of the shards: which one stays is decided by the order of the input, not by who converted it."""

import dataclasses
import io
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cluster.manifest import FolderError, read_manifest
from cluster.settings import SettingError
from data_pipeline.convert import PreprocessConfig, fraction_of
from data_pipeline.dedupe import DedupeConfig
from data_pipeline.folders import Shards
from data_pipeline.merge import merge
from data_pipeline.preprocess import preprocess
from tests.pairs import caption, encoded, tree, write_tar

SIDE = 32


class Killed(BaseException):
    """Stands for a kill: nothing in the program may catch it."""


def scene(seed: int) -> Image.Image:
    """A picture of its own, of large shapes."""
    cells = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8)
    return Image.fromarray(cells).resize((SIDE, SIDE), Image.Resampling.BICUBIC)


def softened(image: Image.Image) -> bytes:
    """Nearly the same picture: as a JPEG."""
    return encoded(image, "jpeg")


def write_source(folder: Path, tars: list[list[tuple[str, bytes]]]) -> Path:
    """Tars of (key, picture) with captions."""
    for number, pairs in enumerate(tars):
        members = []
        for n, (key, data) in enumerate(pairs):
            members += [(f"{key}.txt", caption(7 * number + n).encode()), (f"{key}.png", data)]
        write_tar(folder / f"{number}.tar", members)
    return folder


def png(seed: int) -> bytes:
    return encoded(scene(seed), "png")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Three tars: one without copies, one with two (one of them near), one of nothing but copies."""
    return write_source(tmp_path / "raw", [
        [("a0", png(0)), ("a1", png(1)), ("a2", png(2))],
        [("b0", png(3)), ("b1", png(1)), ("b2", png(4)), ("b3", softened(scene(2))), ("b4", png(3))],
        [("c0", png(0)), ("c1", png(4))],
    ])  # fmt: skip


def config_of(source: Path, out: Path, dedupe: DedupeConfig, **changes: Any) -> PreprocessConfig:
    config = PreprocessConfig(
        source=str(source), out=str(out), image_side=SIDE, image_format="png", heldout_fraction=0.0, vocab_size=290,
        dedupe=dedupe,
    )  # fmt: skip
    return dataclasses.replace(config, **changes)


def keys(out: Path, split: str = "train") -> list[str]:
    return [sample.key for sample in Shards(out / "images", "images", split)]


def report(out: Path) -> dict[str, int]:
    return json.loads((out / "report.json").read_text())


def test_the_first_of_equal_pictures_stays(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    preprocess(config_of(source, out, DedupeConfig(exact=True)))
    assert keys(out) == ["a0", "a1", "a2", "b0", "b2", "b3"]
    assert report(out) == {"read": 10, "kept: train": 6, "dropped: copy of a picture kept": 4}
    page = (out / "report.html").read_text()
    assert "b1 = a1, b4 = b0, c0 = a0, c1 = b2" in page
    manifest = read_manifest(out / "images", "images")
    assert manifest.counts == {"train": 6, "heldout": 0} and sorted(manifest.files) == [
        "train-000000.tar", "train-000001.tar"]  # fmt: skip
    assert manifest.settings["dedupe"] == {"exact": True, "near": -1, "against": ""}
    assert not (out / "images" / "before").exists() and not (out / "images" / "train-000002.tar").exists()


def test_near_copies_go_too(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    preprocess(config_of(source, out, DedupeConfig(near=6)))
    assert keys(out) == ["a0", "a1", "a2", "b0", "b2"]
    assert report(out)["dropped: near copy of a picture kept"] == 1


def test_what_is_left_is_what_went_in(source: Path, tmp_path: Path) -> None:
    preprocess(config_of(source, tmp_path / "all", DedupeConfig()))
    preprocess(config_of(source, tmp_path / "out", DedupeConfig(exact=True)))
    before = {sample.key: sample.files for sample in Shards(tmp_path / "all" / "images", "images", "train")}
    for sample in Shards(tmp_path / "out" / "images", "images", "train"):
        assert sample.files == before[sample.key]


def test_training_is_kept_clear_of_what_is_held_out(source: Path, tmp_path: Path) -> None:
    """Though the held-out tar is numbered like the first and converted last."""
    heldout = write_source(tmp_path / "held", [[("h0", png(1)), ("h1", png(9)), ("h2", png(9))]])
    out = tmp_path / "out"
    preprocess(config_of(source, out, DedupeConfig(exact=True), heldout_source=str(heldout)))
    assert keys(out, "heldout") == ["h0", "h1"]
    assert keys(out) == ["a0", "a2", "b0", "b2", "b3"]
    assert report(out) == {
        "read": 13, "kept: train": 5, "kept: heldout": 2,
        "dropped: copy of a picture held out": 2, "dropped: copy of a picture kept": 4,
    }  # fmt: skip


def test_a_held_out_fraction_is_kept_clear_of_too(source: Path, tmp_path: Path) -> None:
    alike = [("a1", "b1"), ("b0", "b4"), ("a0", "c0"), ("b2", "c1")]
    later, earlier = min((fraction_of(b), a, b) for a, b in alike if fraction_of(b) < fraction_of(a))[:0:-1]
    out = tmp_path / "out"
    preprocess(config_of(source, out, DedupeConfig(exact=True), heldout_fraction=fraction_of(later) + 1e-9))
    assert later in keys(out, "heldout") and earlier not in keys(out)


def test_the_set_to_keep_clear_of_loses_nothing_and_takes_its_copies_away(source: Path, tmp_path: Path) -> None:
    """Its own copies do not matter, and a picture near any of them goes."""
    others = write_source(tmp_path / "others", [[("o0", png(0)), ("o1", png(0)), ("o2", softened(scene(4)))]])
    preprocess(config_of(others, tmp_path / "first", DedupeConfig()))
    against = str(tmp_path / "first" / "images")
    out = tmp_path / "out"
    preprocess(config_of(source, out, DedupeConfig(near=6, against=against)))
    assert keys(out) == ["a1", "a2", "b0"]
    assert report(out)["dropped: copy of a picture in the set to keep clear of"] == 2
    assert report(out)["dropped: near copy of a picture in the set to keep clear of"] == 2
    made_from = read_manifest(out / "images", "images").made_from
    assert made_from == {"against": read_manifest(Path(against), "images").fingerprint}
    with pytest.raises(FolderError, match="nowhere does not exist"):
        preprocess(config_of(source, tmp_path / "other", DedupeConfig(near=6, against=str(tmp_path / "nowhere"))))


@pytest.mark.parametrize(("tasks", "workers"), [(1, 1), (2, 1), (3, 2)])
def test_tasks_and_workers_do_not_matter(source: Path, tmp_path: Path, tasks: int, workers: int) -> None:
    dedupe = DedupeConfig(near=6)
    preprocess(config_of(source, tmp_path / "whole", dedupe))
    for task in reversed(range(tasks)):
        preprocess(config_of(source, tmp_path / "out", dedupe, tasks=tasks, task=task))
    merge(config_of(source, tmp_path / "out", dedupe, tasks=tasks, workers=workers))
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")
    preprocess(config_of(source, tmp_path / "out", dedupe, tasks=tasks, task=0))
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


def test_a_merge_killed_at_any_write_goes_on_to_the_same_bytes(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    others = write_source(tmp_path / "others", [[("o0", png(0))]])
    preprocess(config_of(others, tmp_path / "first", DedupeConfig()))
    dedupe = DedupeConfig(near=6, against=str(tmp_path / "first" / "images"))
    preprocess(config_of(source, tmp_path / "whole", dedupe))
    whole = tree(tmp_path / "whole")
    real = {name: getattr(os, name) for name in ("replace", "link", "unlink", "rmdir")}
    for moves in range(200):
        out, left = tmp_path / f"out{moves}", [moves]
        preprocess(config_of(source, out, dedupe, tasks=1, task=0))
        for name, step in real.items():

            def counted(*words: Any, step: Any = step, left: list[int] = left, **more: Any) -> None:
                left[0] -= 1
                if left[0] < 0:
                    raise Killed
                step(*words, **more)

            monkeypatch.setattr(os, name, counted)
        try:
            merge(config_of(source, out, dedupe))
        except Killed:
            monkeypatch.undo()
            merge(config_of(source, out, dedupe))
            assert tree(out) == whole, moves
            continue
        monkeypatch.undo()
        assert moves > 15 and tree(out) == whole
        return
    raise AssertionError("no merge was ever finished")


def test_a_file_system_without_hard_links_does(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    preprocess(config_of(source, tmp_path / "whole", DedupeConfig(exact=True)))

    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    preprocess(config_of(source, tmp_path / "out", DedupeConfig(exact=True)))
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


def test_lossy_pictures_are_compared_as_they_are_stored(tmp_path: Path) -> None:
    """So a set and a copy of it, both stored as WebP, have equal pictures, and different ones not."""
    first = write_source(tmp_path / "first", [[("a0", png(0)), ("a1", png(1))]])
    second = write_source(tmp_path / "second", [[("b0", png(1)), ("b1", png(2))]])
    preprocess(config_of(first, tmp_path / "one", DedupeConfig(), image_format="webp"))
    against = DedupeConfig(exact=True, against=str(tmp_path / "one" / "images"))
    preprocess(config_of(second, tmp_path / "two", against, image_format="webp"))
    assert keys(tmp_path / "two") == ["b1"]
    stored = next(iter(Shards(tmp_path / "two" / "images", "images", "train"))).files["webp"]
    assert Image.open(io.BytesIO(stored)).size == (SIDE, SIDE)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"image_side": 16}, "image_side: 32 there, 16 here"),
        ({"image_format": "jpg"}, "image_format: 'webp' there, 'jpg' here"),
        ({"image_quality": 80}, "image_quality: 90 there, 80 here"),
        ({"image_format": "png", "image_quality": 80}, "image_format: 'webp' there, 'png' here"),
    ],
)
def test_a_set_stored_otherwise_is_refused_where_only_equal_pixels_count(
    source: Path, tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    """No picture of it would be found; by their looks they are."""
    preprocess(config_of(source, tmp_path / "first", DedupeConfig(), image_format="webp"))
    config = config_of(source, tmp_path / "out", DedupeConfig(True, -1, str(tmp_path / "first" / "images")))
    config = dataclasses.replace(config, **({"image_format": "webp"} | changes))
    with pytest.raises(SettingError, match=rf"stored otherwise \({said}\): use dedupe\.near=4"):
        preprocess(config)
    assert not (tmp_path / "out").exists()
    with pytest.raises(FolderError, match="gave no usable"):
        preprocess(dataclasses.replace(config, dedupe=dataclasses.replace(config.dedupe, near=6)))


def test_the_quality_of_lossless_pictures_does_not_matter(source: Path, tmp_path: Path) -> None:
    preprocess(config_of(source, tmp_path / "first", DedupeConfig(), image_quality=50))
    against = DedupeConfig(True, -1, str(tmp_path / "first" / "images"))
    with pytest.raises(FolderError, match="gave no usable"):
        preprocess(config_of(source, tmp_path / "out", against))
