"""One part of the input becomes shards and a record: what is dropped, and when a part counts as done."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from cluster.command import run_command
from data_pipeline.convert import PreprocessConfig, all_parts, convert_part, image_settings, read_record
from data_pipeline.dedupe import DedupeConfig
from data_pipeline.filters import FilterConfig
from data_pipeline.preprocess import COMMAND, preprocess
from data_pipeline.remote_cache import RemoteFile
from tests.pairs import pair_members, picture, write_tar


def config_of(source: Path, out: Path, **changes: Any) -> PreprocessConfig:
    return PreprocessConfig(
        source=str(source), out=str(out), image_side=16, image_format="png", vocab_size=280, heldout_fraction=0.0,
        **changes,
    )  # fmt: skip


def test_filters_drop_by_caption_fields_size_and_bytes_each_with_its_reason(tmp_path: Path) -> None:
    blocked = picture("purple", (24, 24))
    (tmp_path / "blocklist").write_text("https://example.org/bad.png\n")
    write_tar(tmp_path / "in" / "a.tar", [
        *pair_members(range(3)),
        ("brief.txt", b"tile"), ("brief.png", picture("red")),
        ("long.txt", b"a long red glass pane"), ("long.png", picture("red", (90, 20))),
        ("bad.txt", b"a picture of something bad"), ("bad.png", blocked),
        ("bad.json", b'{"url": "https://example.org/bad.png"}'),
        ("torn.txt", b"its fields are torn, it stays"), ("torn.png", picture("red")), ("torn.json", b'{"url": '),
        ("list.txt", b"its fields are a list, it stays"), ("list.png", picture("red")), ("list.json", b"[1]"),
        ("brief2.txt", b"glass"), ("brief2.png", picture("red")),
    ])  # fmt: skip
    filters = FilterConfig(min_words=2, max_aspect=2.0, blocklist=(str(tmp_path / "blocklist"),))
    preprocess(config_of(tmp_path / "in", tmp_path / "out", filters=filters))
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == {
        "read": 9, "kept: train": 5, "dropped: caption too short": 2, "dropped: aspect ratio": 1,
        "dropped: blocklist: url": 1,
    }  # fmt: skip
    page = (tmp_path / "out" / "report.html").read_text()
    assert "<td>brief, brief2" in page and "<td>long" in page and "<td>bad" in page


def test_samples_that_a_threshold_cannot_judge_are_counted_and_a_field_that_none_has_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    members = pair_members(range(5))
    members[0] = ("0000.json", b'{"punsafe": 0.1}')
    members[3] = ("0001.json", b'{"punsafe": 0.9}')
    members[6] = ("0002.json", b'{"punsafe": "high"}')
    write_tar(tmp_path / "in" / "a.tar", members)
    rules = FilterConfig(thresholds="punsafe<0.5, punsafx<0.5, punsafx>=0")
    preprocess(config_of(tmp_path / "in", tmp_path / "out", filters=rules))
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == {
        "read": 5, "kept: train": 4, "dropped: not punsafe<0.5": 1, "passed though punsafe is missing": 3,
        "passed though punsafx is missing": 4,
    }  # fmt: skip
    lines = [line for line in capsys.readouterr().err.splitlines() if "thresholds" in line]
    assert lines == [
        "smalti preprocess: filters.thresholds: none of the 4 pairs that passed has a number named punsafx in its "
        "KEY.json, so none was judged by it; is the name right?"
    ]


def test_copies_that_go_later_do_not_hide_a_field_that_none_has(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_tar(tmp_path / "in" / "a.tar", pair_members(range(8)))  # of seven colours
    rules = FilterConfig(thresholds="punsafx<0.5")
    config = config_of(tmp_path / "in", tmp_path / "out", filters=rules, dedupe=DedupeConfig(exact=True))
    preprocess(config)
    assert "none of the 8 pairs that passed has a number named punsafx" in capsys.readouterr().err
    assert json.loads((tmp_path / "out" / "report.json").read_text())["kept: train"] == 7


def test_a_rule_that_makes_no_sense_is_refused_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_tar(tmp_path / "in" / "a.tar", pair_members(range(3)))
    words = [f"source={tmp_path / 'in'}", f"out={tmp_path / 'out'}", "filters.blocklist=nowhere.txt"]
    assert run_command(COMMAND, words) in (1, 2)
    assert "nowhere.txt" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_settings_that_came_later_do_not_change_folders_made_without_them(tmp_path: Path) -> None:
    plain = image_settings(config_of(tmp_path, tmp_path, workers=3, tasks=4, task=1))
    assert not {"filters", "dedupe", "tasks", "task", "workers", "out", "cache"} & plain.keys()
    assert plain.keys() == {
        "source", "heldout_source", "heldout_fraction", "image_side", "image_format", "image_quality", "max_pixels",
        "caption_field", "samples_per_shard",
    }  # fmt: skip
    changed = image_settings(
        config_of(tmp_path, tmp_path, filters=FilterConfig(min_words=2), dedupe=DedupeConfig(True))
    )
    assert changed["filters"]["min_words"] == 2 and changed["dedupe"]["exact"] is True


def test_a_blocklist_counts_by_what_is_in_it(tmp_path: Path) -> None:
    path = tmp_path / "blocklist"
    settings = []
    for line in ("https://example.org/a.png\n", "https://example.org/b.png\n"):
        path.write_text(line)
        settings.append(image_settings(config_of(tmp_path, tmp_path, filters=FilterConfig(blocklist=(str(path),)))))
    assert settings[0] != settings[1]
    path.rename(tmp_path / "elsewhere")
    moved = config_of(tmp_path, tmp_path, filters=FilterConfig(blocklist=(str(tmp_path / "elsewhere"),)))
    assert image_settings(moved) == settings[1]


def test_a_part_is_done_when_its_record_and_all_its_files_are_there(tmp_path: Path) -> None:
    write_tar(tmp_path / "in" / "a.tar", pair_members(range(8)))
    config = config_of(tmp_path / "in", tmp_path / "out")
    (part,) = all_parts(config)
    images = tmp_path / "out" / "images"
    images.mkdir(parents=True)
    assert read_record(part, images) is None
    assert convert_part(part, config) == {"read": 8, "kept: train": 8}
    record = read_record(part, images)
    assert record is not None and record.files.keys() == {"train-000000.tar"}
    for name in ("train-000000.tar", "train-000000.json", "train-000000.done.json"):
        whole = (images / name).read_bytes()
        (images / name).unlink()
        assert read_record(part, images) is None, name
        if not name.endswith("0.json"):
            (images / name).write_bytes(whole[:-2])
            assert read_record(part, images) is None, name
        assert convert_part(part, config) == {"read": 8, "kept: train": 8}
        assert (images / name).read_bytes() == whole


def test_an_old_record_is_made_again(tmp_path: Path) -> None:
    """Before there were tasks it was the fates alone."""
    write_tar(tmp_path / "in" / "a.tar", pair_members(range(8)))
    config = config_of(tmp_path / "in", tmp_path / "out")
    images = tmp_path / "out" / "images"
    images.mkdir(parents=True)
    (images / "train-000000.done.json").write_text('{"kept: train": 8, "read": 8}')
    (part,) = all_parts(config)
    assert read_record(part, images) is None


def test_a_part_of_other_bytes_than_its_record_tells_is_not_done(tmp_path: Path) -> None:
    """Records made before the bytes were kept stay valid; a tar elsewhere, whose bytes are not known, too."""
    tar = write_tar(tmp_path / "in" / "a.tar", pair_members(range(8)))
    config = config_of(tmp_path / "in", tmp_path / "out")
    (part,) = all_parts(config)
    images = tmp_path / "out" / "images"
    images.mkdir(parents=True)
    convert_part(part, config)
    path = images / "train-000000.done.json"
    record = json.loads(path.read_text())
    assert record.pop("source_bytes") == tar.stat().st_size
    assert read_record(part, images) is not None
    write_tar(tar, pair_members(range(80)))
    assert read_record(part, images) is None
    path.write_text(json.dumps(record))
    assert read_record(part, images) is not None
    path.write_text(json.dumps(record | {"source_bytes": None}))
    elsewhere = RemoteFile("http://127.0.0.1/a.tar", config.cache)
    assert read_record(dataclasses.replace(part, paths=(), remote=elsewhere), images) is not None
