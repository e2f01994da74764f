"""Raw pairs to shards: the same bytes however it is run, and every sample accounted for."""

import dataclasses
import gzip
import json
import os
import shutil
import threading
from collections.abc import Callable
from multiprocessing import active_children
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cluster.command import run_command
from cluster.manifest import FolderError, read_manifest
from cluster.settings import SettingError, UserError
from data_pipeline import preprocess as stage
from data_pipeline.bpe import open_vocabulary
from data_pipeline.images import square
from data_pipeline.loader import Shards
from data_pipeline.preprocess import COMMAND, PreprocessConfig, preprocess
from data_pipeline.sources import Part
from tests.pairs import caption, encoded, make_pairs, pair_members, picture, tree, write_tar


class Killed(BaseException):
    """Stands for a kill: nothing in the program may catch it."""


def config_of(source: Path, out: Path, **changes: Any) -> PreprocessConfig:
    config = PreprocessConfig(
        source=str(source),
        out=str(out),
        image_side=16,
        image_format="png",
        samples_per_shard=5,
        heldout_fraction=0.2,
        vocab_size=300,
    )
    return dataclasses.replace(config, **changes)


def run(source: Path, out: Path, **changes: Any) -> dict[str, int]:
    """Run the stage; returns its report."""
    preprocess(config_of(source, out, **changes))
    return json.loads((out / "report.json").read_text())


def kept(out: Path, split: str = "train") -> dict[str, dict[str, bytes]]:
    return {sample.key: sample.files for sample in Shards(out / "images", "images", split)}


def test_two_runs_and_two_workers_give_the_same_bytes(pairs: Path, tmp_path: Path) -> None:
    report = run(pairs, tmp_path / "one")
    run(pairs, tmp_path / "two")
    run(pairs, tmp_path / "three", workers=2)
    one = tree(tmp_path / "one")
    assert {"images/manifest.json", "images/train-000002.tar", "vocab/bpe.model", "report.html"} <= one.keys()
    assert one == tree(tmp_path / "two") == tree(tmp_path / "three")
    assert report["kept: train"] + report["kept: heldout"] == report["read"] == 12
    assert report["kept: heldout"] > 0
    assert not kept(tmp_path / "one").keys() & kept(tmp_path / "one", "heldout").keys()


def test_pairs_come_out_as_they_went_in(pairs: Path, tmp_path: Path) -> None:
    (pairs / "0003.json").write_text('{"licence": "CC0"}')
    run(pairs, tmp_path / "out", heldout_fraction=0.0)
    files = kept(tmp_path / "out")
    assert {key: content["txt"].decode() for key, content in files.items()} == {
        f"{n:04d}": caption(n) for n in range(12)
    }
    assert (square(files["0000"]["png"], 16) == [255, 0, 0]).all()
    assert files["0003"]["json"] == b'{"licence": "CC0"}' and "json" not in files["0004"]
    manifest = read_manifest(tmp_path / "out" / "images", "images")
    assert manifest.counts == {"train": 12, "heldout": 0}
    vocabulary, _ = open_vocabulary(tmp_path / "out" / "vocab")
    assert vocabulary.size == 300


def test_the_held_out_source_is_held_out_and_nothing_else(tmp_path: Path) -> None:
    a, b = make_pairs(tmp_path / "a", 7), write_tar(tmp_path / "b.tar", pair_members(range(50, 54)))
    run(a, tmp_path / "out", heldout_source=str(b))
    assert len(kept(tmp_path / "out")) == 7
    assert sorted(kept(tmp_path / "out", "heldout")) == ["0050", "0051", "0052", "0053"]


def test_pictures_of_every_kind_become_rgb(tmp_path: Path) -> None:
    """Colour, and white where a picture is transparent; a PNG named .jpg is told by its bytes."""
    clear = Image.new("RGBA", (20, 20), (0, 0, 0, 0))
    clear.paste((0, 0, 255, 255), (0, 0, 20, 10))
    palette = Image.new("RGB", (20, 20), (10, 200, 30)).convert("P", palette=Image.Palette.ADAPTIVE)
    pictures = {
        "grey.png": encoded(Image.new("L", (20, 20), 77), "png"),
        "cmyk.jpg": encoded(Image.new("CMYK", (20, 20), (0, 0, 255, 0)), "jpeg"),
        "palette.gif": encoded(palette, "gif"),
        "clear.png": encoded(clear, "png"),
        "named.jpg": picture("red", (20, 20), "png"),
    }
    for name, data in pictures.items():
        (tmp_path / "in" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "in" / name).write_bytes(data)
        (tmp_path / "in" / name).with_suffix(".txt").write_text(f"a picture of kind {name}")
    report = run(tmp_path / "in", tmp_path / "out", heldout_fraction=0.0, vocab_size=290)
    assert report == {"kept: train": 5, "read": 5}
    corners = {}
    for key, files in kept(tmp_path / "out").items():
        pixels = square(files["png"], 16)
        assert pixels.shape == (16, 16, 3)
        corners[key] = pixels[0, 0].tolist(), pixels[-1, -1].tolist()
    assert corners["grey"] == ([77] * 3, [77] * 3)
    assert corners["palette"] == ([10, 200, 30], [10, 200, 30])
    assert corners["clear"] == ([0, 0, 255], [255] * 3)
    assert corners["named"] == ([255, 0, 0], [255, 0, 0])
    assert np.abs(np.array(corners["cmyk"]) - [255, 255, 0]).max() < 15


def test_every_drop_is_counted_with_its_reason(tmp_path: Path) -> None:
    noise = encoded(Image.effect_noise((64, 64), 90), "jpeg")
    bad = [
        ("broken.png", b"no picture"), ("broken.txt", b"a"),
        ("cut.jpg", noise[: len(noise) // 2]), ("cut.txt", b"a"),
        ("large.png", picture("red", (80, 80))), ("large.txt", b"a"),
        ("long.png", picture("red", (2, 3000))), ("long.txt", b"kept, png may be long"),
        ("empty.png", picture("red")), ("empty.txt", b" \n"),
        ("none.png", picture("red")), ("none.json", b'{"caption": null}'),
        ("alone.txt", b"no picture beside me"),
        ("0001.png", picture("red")), ("0001.txt", b"another 0001"),
    ]  # fmt: skip
    write_tar(tmp_path / "in" / "a.tar", pair_members(range(8)) + bad)
    report = run(tmp_path / "in", tmp_path / "out", heldout_fraction=0.0, max_pixels=6400 - 1)
    assert report == {
        "read": 16,
        "kept: train": 9,
        "dropped: image unreadable": 2,
        "dropped: image too large": 1,
        "dropped: no caption": 2,
        "dropped: no picture": 1,
        "dropped: key used twice": 1,
    }
    assert kept(tmp_path / "out")["0001"]["txt"].decode() == caption(1)
    page = (tmp_path / "out" / "report.html").read_text()
    assert all(reason in page for reason in report)


def test_a_picture_that_the_format_cannot_hold_is_dropped(pairs: Path, tmp_path: Path) -> None:
    (pairs / "0002.png").write_bytes(picture("red", (4, 17_000)))
    report = run(pairs, tmp_path / "out", image_format="webp")
    assert report["dropped: image too long for webp"] == 1
    assert report["kept: train"] + report["kept: heldout"] == 11


def test_img2dataset_folders_are_read_whole(tmp_path: Path) -> None:
    """Members sorted json, txt, picture; captions from the json where there is no .txt, unless null."""
    for shard in range(2):
        members = pair_members(range(4 * shard, 4 * shard + 4))
        members = [member for member in members if member[0] not in ("0001.txt", "0006.txt")]
        members = [(name, b'{"caption": null}' if name == "0006.json" else data) for name, data in members]
        write_tar(tmp_path / "in" / f"{shard:05d}.tar", members)
        (tmp_path / "in" / f"{shard:05d}.parquet").write_bytes(b"PAR1")
        (tmp_path / "in" / f"{shard:05d}_stats.json").write_text('{"successes": 4}')
    report = run(tmp_path / "in", tmp_path / "out", heldout_fraction=0.0)
    assert report == {"read": 8, "kept: train": 7, "dropped: no caption": 1}
    assert kept(tmp_path / "out")["0001"]["txt"].decode() == caption(1)


def test_damaged_tars_are_named_and_counted_and_the_rest_survives(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "in"
    for number in range(3):
        write_tar(source / f"{number}.tar", pair_members(range(4 * number, 4 * number + 4)))
    whole = (source / "1.tar").read_bytes()
    (source / "1.tar").write_bytes(whole[: whole.index(b"0006.txt") + 600])
    (source / "3.tar").write_bytes(bytes(10240))
    (source / "4.tar").write_bytes(b"")
    packed = gzip.compress(whole)
    (source / "5.tar.gz").write_bytes(packed[: len(packed) // 2])
    report = run(source, tmp_path / "out", heldout_fraction=0.0)
    said = capsys.readouterr().err
    assert report["damaged or empty tar"] == 4
    for name in ("1.tar", "3.tar", "4.tar", "5.tar.gz"):
        assert sum(line.startswith(f"smalti preprocess: {source / name} ") for line in said.splitlines()) == 1
    keys = set(kept(tmp_path / "out"))
    assert {f"{n:04d}" for n in (0, 1, 2, 3, 4, 5, 8, 9, 10, 11)} <= keys


@pytest.mark.parametrize("after", [1, 2])
def test_a_run_killed_between_parts_goes_on_to_the_same_bytes(
    pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    run(pairs, tmp_path / "whole")
    real = stage.convert_part

    def convert_and_die(part: Part, *words: Any) -> Any:
        if part.number == after:
            raise Killed
        return real(part, *words)

    monkeypatch.setattr(stage, "convert_part", convert_and_die)
    with pytest.raises(Killed):
        run(pairs, tmp_path / "out")
    with pytest.raises(FolderError, match="not a finished images folder"):
        Shards(tmp_path / "out" / "images", "images", "train")
    monkeypatch.undo()
    first = tmp_path / "out" / "images" / "train-000000.tar"
    before = first.stat().st_mtime_ns
    run(pairs, tmp_path / "out")
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")
    assert first.stat().st_mtime_ns == before


def test_a_run_killed_at_any_write_goes_on_to_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each file's step from its temporary name to its own in turn is the last thing that is done."""
    source = make_pairs(tmp_path / "in", 9)
    run(source, tmp_path / "whole", vocab_size=290)
    whole = tree(tmp_path / "whole")
    real = os.replace
    for moves in range(100):
        out, left = tmp_path / f"out{moves}", [moves]

        def replace(*words: Any, left: list[int] = left) -> None:
            left[0] -= 1
            if left[0] < 0:
                raise Killed
            real(*words)

        monkeypatch.setattr(os, "replace", replace)
        try:
            run(source, out, vocab_size=290)
        except Killed:
            monkeypatch.undo()
            run(source, out, vocab_size=290)
            assert tree(out) == whole, moves
            continue
        monkeypatch.undo()
        assert moves > 10 and tree(out) == whole
        return
    raise AssertionError("no run was ever finished")


def test_what_is_missing_is_made_again_and_what_is_finished_is_left(
    pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    run(pairs, out)
    whole = tree(out)
    for missing in (["images/manifest.json", "images/train-000001.done.json"], ["vocab/manifest.json"], ["vocab"]):
        for name in missing:
            shutil.rmtree(out / name) if (out / name).is_dir() else (out / name).unlink()
        run(pairs, out)
        assert tree(out) == whole, missing
    times = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    capsys.readouterr()
    run(pairs, out)
    assert "finished already" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == times


def test_a_folder_begun_or_finished_with_other_settings_is_refused(pairs: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(pairs, out)
    with pytest.raises(FolderError, match="image_side: 16 there, 8 here"):
        run(pairs, out, image_side=8)
    (out / "images" / "manifest.json").unlink()
    with pytest.raises(FolderError, match="begun with other settings"):
        run(pairs, out, image_side=8)
    run(pairs, out, workers=1)


def test_a_worker_that_is_killed_stops_the_run_instead_of_hanging_it(tmp_path: Path) -> None:
    pipes = [tmp_path / f"{number}.tar" for number in range(2)]
    for pipe in pipes:
        os.mkfifo(pipe)
    before = set(active_children())

    def kill_the_first() -> None:
        opened = [os.open(pipe, os.O_WRONLY) for pipe in pipes]  # returns when both workers wait for what is in them
        min(set(active_children()) - before, key=lambda child: child.pid or 0).kill()
        done.wait(60)
        for descriptor in opened:
            os.close(descriptor)

    done = threading.Event()
    threading.Thread(target=kill_the_first, daemon=True).start()
    with pytest.raises(UserError, match="a worker was killed"):
        run(tmp_path / "{0..1}.tar", tmp_path / "out", workers=2)
    done.set()


@pytest.mark.parametrize(
    ("change", "code", "said"),
    [
        (lambda folder: ["source=" + str(folder / "nowhere")], 1, "nowhere does not exist"),
        (lambda folder: [], 2, "source is empty"),
        (lambda folder: [f"source={folder}", "vocab_size=100000"], 2, "vocab_size=100000 does not fit"),
        (lambda folder: [f"source={folder}", "vocab_size=256"], 2, "vocab_size=256 must be above 256"),
        (lambda folder: [f"source={folder}", "heldout_fraction=1.0"], 2, "heldout_fraction=1.0"),
        (lambda folder: [f"source={folder}", "image_quality=0"], 2, "image_quality=0"),
        (lambda folder: [f"source={folder}", "image_format=bmp"], 2, "image_format='bmp'"),
        (lambda folder: [f"source={folder}", "workers=0"], 2, "workers=0"),
        (lambda folder: [f"source={folder}", "max_pixels=1"], 1, "no usable image-caption pair"),
    ],
)
def test_a_mistake_is_one_line_and_an_exit_code(
    pairs: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    change: Callable[[Path], list[str]],
    code: int,
    said: str,
) -> None:
    assert run_command(COMMAND, [*change(pairs), f"out={tmp_path / 'out'}"]) == code
    errors = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("preprocess: ")]
    assert len(errors) == 1 and said in errors[0] and errors[0].startswith("smalti preprocess: ")


def test_the_embedded_preset_runs_on_the_embedded_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its sources and settings fit each other; the held-out part is small enough to be run here."""
    words = ["emoji", "source=emoji:heldout", "heldout_source=", "heldout_fraction=0.1", "vocab_size=500"]
    assert run_command(COMMAND, [*words, f"out={tmp_path}"]) == 0
    assert json.loads((tmp_path / "report.json").read_text())["read"] == 188
    for files in kept(tmp_path).values():
        assert square(files["png"], 64).shape == (64, 64, 3) and json.loads(files["json"])["license"]


def test_refused_settings_are_refused_before_anything_is_written(pairs: Path, tmp_path: Path) -> None:
    config = config_of(pairs, tmp_path / "out")
    with pytest.raises(SettingError, match="samples_per_shard=0"):
        dataclasses.replace(config, samples_per_shard=0)
    with pytest.raises(SettingError, match="source is empty"):
        preprocess(dataclasses.replace(config, source=""))
    assert not (tmp_path / "out").exists()
