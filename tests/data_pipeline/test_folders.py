"""Folders read together: one set of samples, refused where they do not fit each other."""

from pathlib import Path

import pytest

from cluster.manifest import FolderError, read_manifest
from cluster.settings import SettingError
from data_pipeline.folders import Shards, joined, open_folders
from data_pipeline.remote import CacheConfig
from tests.data_pipeline.token_folders import MADE_FROM, write_tokens


def opened(text: str, split: str = "train") -> Shards:
    return Shards(open_folders(text, "tokens", CacheConfig()), "tokens", split)


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    write_tokens(tmp_path / "a", [3, 2])
    write_tokens(tmp_path / "b", [4], 50, MADE_FROM | {"images": "j" * 64})
    return tmp_path


def test_several_folders_are_one_set_in_their_order_and_take_turns_when_read_through(folders: Path) -> None:
    both = opened(f"{folders}/a::{folders}/b")
    assert both.source_sizes == [[3, 2], [4]] and both.sizes == [3, 2, 4] and len(both) == 9
    assert both.read((2, 1)).key == "0051"
    keys = ["0000", "0050", "0001", "0051", "0002", "0052", "0003", "0053", "0004"]
    assert [sample.key for sample in both] == keys
    assert [sample.key for sample in opened(f"{folders}/a::{folders}/b", "heldout")] == ["0900", "0950"]


def test_one_folder_is_what_its_path_gives(folders: Path) -> None:
    one, other = opened(f"{folders}/a"), Shards(folders / "a", "tokens", "train")
    assert one.manifest == other.manifest == read_manifest(folders / "a", "tokens")
    assert [sample.key for sample in one] == [sample.key for sample in other] == [f"{n:04d}" for n in range(5)]


def test_one_manifest_speaks_for_all(folders: Path) -> None:
    manifests = [read_manifest(folders / name, "tokens") for name in "ab"]
    both = joined(manifests)
    assert both.counts == {"train": 9, "heldout": 2, "grid": 2, "codebook": 512, "captions_by_tokens": [0] * 5 + [9]}
    assert {name: both.made_from[name] for name in ("dvae", "vocab")} == {"dvae": "d" * 64, "vocab": "v" * 64}
    assert both.made_from["images"] not in ("i" * 64, "j" * 64)
    fingerprints = {joined(m).fingerprint for m in ([manifests[0]], [manifests[1]], manifests, manifests[::-1])}
    assert len(fingerprints) == 4


@pytest.mark.parametrize("name", ["dvae", "vocab"])
def test_folders_of_different_makers_are_refused(folders: Path, name: str) -> None:
    write_tokens(folders / "c", [4], 50, MADE_FROM | {name: "x" * 64})
    with pytest.raises(FolderError, match=f"made with different {name} .{MADE_FROM[name][:12]}, xxxxxxxxxxxx"):
        opened(f"{folders}/a::{folders}/c")


def test_a_folder_without_the_split_is_refused(folders: Path) -> None:
    write_tokens(folders / "c", [])
    with pytest.raises(FolderError, match=r"/c has no train shards \(it holds: heldout-000000.tar\)"):
        opened(f"{folders}/a::{folders}/c")


@pytest.mark.parametrize("text", ["", "a::", "a::a"])
def test_folders_are_named_each_once(text: str) -> None:
    with pytest.raises(SettingError, match="must name folders, each once, with :: between them"):
        open_folders(text, "tokens", CacheConfig())


def test_damage_at_the_start_is_refused_with_what_to_do_unless_only_names_are_wanted(folders: Path) -> None:
    tar = folders / "a" / "train-000001.tar"
    tar.unlink()
    with pytest.raises(FolderError, match=r"000001\.tar is missing.*put back a copy.*run `smalti tokenise` again"):
        opened(f"{folders}/a")
    indexed = Shards(open_folders(f"{folders}/a", "tokens", CacheConfig(), whole=False), "tokens", "train")
    assert indexed.name((1, 0)) == f"{tar}, sample 0003"
    tar.with_suffix(".json").write_text("{}")
    with pytest.raises(FolderError, match=r"train-000001\.json, the index of train-000001\.tar, cannot be read"):
        Shards(open_folders(f"{folders}/a", "tokens", CacheConfig(), whole=False), "tokens", "train")
