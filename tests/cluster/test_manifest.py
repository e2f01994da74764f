"""Manifests: a folder that is missing, unfinished, damaged or of other origin is refused and says so."""

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest

from cluster.manifest import (
    NAME,
    FolderError,
    check_files,
    file_digest,
    fingerprint_of,
    is_done,
    read_manifest,
    refuse_other_origin,
    sweep,
    temporary,
    write_bytes,
    write_manifest,
)

SETTINGS = {"side": 16, "model": {"width": 8, "rates": (1, 2)}}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "tokens"
    folder.mkdir()
    (folder / "a.tar").write_bytes(b"aaaa")
    (folder / "b.tar").write_bytes(b"bb")
    write_manifest(folder, "tokens", SETTINGS, {"train": 2}, ["a.tar", "b.tar"], {"dvae": "d" * 64})
    return folder


def test_manifest_reads_back_with_sizes_and_digests(folder: Path) -> None:
    manifest = read_manifest(folder, "tokens")
    assert manifest.counts == {"train": 2}
    assert manifest.made_from == {"dvae": "d" * 64}
    assert {name: record["bytes"] for name, record in manifest.files.items()} == {"a.tar": 4, "b.tar": 2}
    assert manifest.files["a.tar"]["sha256"] == file_digest(folder / "a.tar")
    assert manifest.versions["torch"].startswith("2.")
    check_files(folder, manifest)


def test_fingerprint_changes_with_kind_name_and_content_but_not_with_order() -> None:
    files: dict[str, dict[str, Any]] = {"a": {"sha256": "1"}, "b": {"sha256": "2"}}
    same: dict[str, dict[str, Any]] = {"b": {"sha256": "2", "bytes": 9}, "a": {"sha256": "1"}}
    others: list[dict[str, dict[str, Any]]] = [{"a": {"sha256": "1"}}, {"a": {"sha256": "2"}, "b": {"sha256": "1"}}]
    prints = [fingerprint_of("x", files), fingerprint_of("y", files)] + [fingerprint_of("x", other) for other in others]
    assert len(set(prints)) == 4
    assert fingerprint_of("x", same) == prints[0]


def test_missing_and_unfinished_folders_name_the_command_that_makes_them(folder: Path) -> None:
    with pytest.raises(FolderError, match="does not exist.*`smalti preprocess`"):
        read_manifest(folder / "none", "vocab")
    (folder / NAME).unlink()
    with pytest.raises(FolderError, match="not a finished tokens folder.*`smalti tokenise`"):
        read_manifest(folder, "tokens")
    assert not is_done(folder, "tokens", SETTINGS, {})


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"kind": "tokens", "colour": 1}', "\x00"])
def test_a_damaged_manifest_is_named(folder: Path, text: str) -> None:
    (folder / NAME).write_text(text)
    with pytest.raises(FolderError, match=r"manifest\.json is damaged") as caught:
        read_manifest(folder, "tokens")
    assert "\n" not in str(caught.value)


def test_another_kind_and_another_format_are_refused(folder: Path) -> None:
    with pytest.raises(FolderError, match="holds tokens, not images"):
        read_manifest(folder, "images")
    values = json.loads((folder / NAME).read_text())
    (folder / NAME).write_text(json.dumps(values | {"format": 99}))
    with pytest.raises(FolderError, match="format 99"):
        read_manifest(folder, "tokens")


def test_a_cut_or_missing_file_is_named_with_its_sizes(folder: Path) -> None:
    manifest = read_manifest(folder, "tokens")
    (folder / "a.tar").write_bytes(b"aaa")
    with pytest.raises(FolderError, match=r"a\.tar has 3 bytes where manifest\.json says 4"):
        check_files(folder, manifest)
    (folder / "a.tar").unlink()
    with pytest.raises(FolderError, match=r"a\.tar is missing"):
        check_files(folder, manifest)


def test_done_means_same_settings_and_same_inputs(folder: Path) -> None:
    made_from = {"dvae": "d" * 64}
    assert is_done(folder, "tokens", SETTINGS, made_from)
    with pytest.raises(
        FolderError, match=r"other settings \(model\.width: 8 there, 9 here; side: 16 there, None here\)"
    ):
        is_done(folder, "tokens", {"model": {"width": 9, "rates": [1, 2]}}, made_from)
    with pytest.raises(FolderError, match="other inputs"):
        is_done(folder, "tokens", SETTINGS, {"dvae": "e" * 64})
    (folder / "b.tar").write_bytes(b"")
    with pytest.raises(FolderError, match=r"b\.tar has 0 bytes"):
        is_done(folder, "tokens", SETTINGS, made_from)


def test_a_folder_of_other_origin_is_refused_with_both_fingerprints(folder: Path) -> None:
    manifest = read_manifest(folder, "tokens")
    refuse_other_origin(folder, manifest, "dvae", folder, "d" * 64)
    with pytest.raises(FolderError, match="another dvae .*dddddddddddd.*eeeeeeeeeeee"):
        refuse_other_origin(folder, manifest, "dvae", folder, "e" * 64)
    with pytest.raises(FolderError, match="fingerprint none"):
        refuse_other_origin(folder, manifest, "vocab", folder, "d" * 64)


@pytest.mark.parametrize("last", ["fsync", "replace"])
def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, last: str) -> None:
    path = tmp_path / "file"
    write_bytes(path, b"old")

    def full(*words: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(f"os.{last}", full)
    with pytest.raises(OSError, match="No space"):
        write_bytes(path, b"new and longer")
    assert path.read_bytes() == b"old"


def test_what_killed_writers_left_is_swept_away_and_nothing_else(tmp_path: Path) -> None:
    left, others = temporary(tmp_path / "a.json"), temporary(tmp_path / "a.json.old")
    for path in (left, others, tmp_path / "a.json.part", tmp_path / "a.json.1.part"):
        path.write_bytes(b"half")
    write_bytes(tmp_path / "a.json", b"whole")
    assert not left.exists() and others.exists() and len(list(tmp_path.iterdir())) == 4
    sweep(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "a.json.1.part", "a.json.part"]


def test_of_two_writers_at_once_the_last_to_end_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though the other swept its temporary file away in between."""
    real, turns = os.fsync, [b"second", b""]

    def write_another_first(descriptor: int) -> None:
        real(descriptor)
        other = turns.pop(0) if turns else b""
        if other:
            write_bytes(tmp_path / "a.json", other)

    monkeypatch.setattr(os, "fsync", write_another_first)
    write_bytes(tmp_path / "a.json", b"first")
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
    assert (tmp_path / "a.json").read_bytes() == b"first"


def test_a_full_disk_leaves_no_temporary_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        write_bytes(tmp_path / "a.json", b"whole")
    assert not list(tmp_path.iterdir())


def test_records_that_are_known_are_not_read_again(tmp_path: Path) -> None:
    record = {"bytes": 3, "sha256": "s" * 64}
    (tmp_path / "tokens").mkdir()
    write_manifest(tmp_path / "tokens", "tokens", {}, {}, {"a.tar": record}, {})
    assert read_manifest(tmp_path / "tokens", "tokens").files == {"a.tar": record}
