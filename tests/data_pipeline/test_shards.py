"""Tar shards: ours are plain WebDataset, theirs are read to the last whole sample and not a silent byte less."""

import gzip
import io
import os
import tarfile
import zlib
from pathlib import Path
from typing import Literal

import pytest
import webdataset

from cluster.manifest import FolderError
from data_pipeline.shards import (
    Sample,
    ShardError,
    open_shard,
    plain_key,
    read_foreign,
    shown,
    write_shard,
)
from tests.pairs import pair_members, write_tar

SAMPLES = [Sample(f"k{n}", {"png": os.urandom(700 * n), "txt": f"text {n}".encode(), "json": b"{}"}) for n in range(4)]


def read_until_damage(path: Path) -> tuple[list[Sample], str]:
    """Samples read, and what ShardError said ("" if there was none)."""
    samples = []
    try:
        for sample in read_foreign(path):
            samples.append(sample)
    except ShardError as error:
        return samples, str(error)
    return samples, ""


def assert_a_prefix(samples: list[Sample], whole: list[Sample]) -> None:
    """The samples are the first of the whole; the last may lack files, but no file differs."""
    assert samples[:-1] == whole[: max(0, len(samples) - 1)]
    for sample, full in zip(samples, whole, strict=False):
        assert sample.key == full.key and sample.files.items() <= full.files.items()


def test_webdataset_reads_our_shards(tmp_path: Path) -> None:
    write_shard(tmp_path / "train-000000.tar", SAMPLES)
    theirs = list(webdataset.WebDataset(str(tmp_path / "train-000000.tar"), shardshuffle=False))
    assert [sample["__key__"] for sample in theirs] == [sample.key for sample in SAMPLES]
    for their, our in zip(theirs, SAMPLES, strict=True):
        assert {ending: their[ending] for ending in our.files} == our.files


def test_a_shard_is_read_by_index_as_it_was_written(tmp_path: Path) -> None:
    written = write_shard(tmp_path / "a.tar", SAMPLES)
    opened = open_shard(tmp_path / "a.tar")
    assert opened == written
    assert [opened.read(number) for number in (3, 0, 2, 1)] == [SAMPLES[number] for number in (3, 0, 2, 1)]
    assert list(read_foreign(tmp_path / "a.tar")) == SAMPLES
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["a.json", "a.tar"]


def test_same_samples_are_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_shard(tmp_path / f"{name}.tar", SAMPLES)
    assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "b.tar").read_bytes()
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()


def test_no_samples_leave_no_file(tmp_path: Path) -> None:
    assert write_shard(tmp_path / "a.tar", []) is None
    assert list(tmp_path.iterdir()) == []


def test_a_shard_without_index_or_of_another_size_is_unfinished(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    write_shard(path, SAMPLES)
    shard, size = open_shard(path), path.stat().st_size
    os.truncate(path, size - 512)
    with pytest.raises(FolderError, match=f"{size - 512} bytes, its index says {size}"):
        open_shard(path)
    os.truncate(path, 2048)
    with pytest.raises(ShardError, match=r"k3\.png is cut"):
        shard.read(3)
    path.with_suffix(".json").write_text("{}")
    with pytest.raises(FolderError, match=r"a\.json.*cannot be read"):
        open_shard(path)


def test_a_tar_cut_anywhere_is_named_and_the_rest_is_read(tmp_path: Path) -> None:
    """Inside data or padding, at a header, inside one, or with the end mark alone gone: never silent."""
    members = [(f"{sample.key}.{ending}", data) for sample in SAMPLES for ending, data in sample.files.items()]
    whole = write_tar(tmp_path / "whole.tar", members).read_bytes()
    with tarfile.open(tmp_path / "whole.tar") as tar:
        headers = [member.offset for member in tar] + [tar.offset]
    end = headers[-1]
    cuts = {cut for at in headers for cut in (at - 1, at, at + 1, at + 300)} | set(range(0, end + 512, 100))
    path = tmp_path / "cut.tar"
    for cut in sorted(cut for cut in cuts if cut >= 0):
        path.write_bytes(whole[:cut])
        samples, said = read_until_damage(path)
        assert str(path) in said and "\n" not in said, cut
        assert_a_prefix(samples, SAMPLES)
        n_whole = sum(1 for at in headers[3::3] if at <= cut)
        assert [sample for sample in samples if sample in SAMPLES] == SAMPLES[:n_whole]
    path.write_bytes(whole[: end + 512])
    assert read_until_damage(path) == (SAMPLES, "")


def test_a_garbled_header_is_named(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", pair_members(range(3)))
    with tarfile.open(path) as tar:
        fourth = tar.getmembers()[3].offset
    data = bytearray(path.read_bytes())
    data[fourth + 3] ^= 1
    path.write_bytes(data)
    samples, said = read_until_damage(path)
    assert [sample.key for sample in samples] == ["0000"]
    assert "after 1 samples" in said


@pytest.mark.parametrize("mode", ["w:gz", "w:bz2", "w:xz"])
def test_compressed_tars_are_read_and_their_damage_is_named(
    tmp_path: Path, mode: Literal["w:gz", "w:bz2", "w:xz"]
) -> None:
    path = write_tar(tmp_path / f"a.tar.{mode[2:]}", pair_members(range(6)), mode)
    whole = list(read_foreign(path))
    assert [sample.key for sample in whole] == [f"{n:04d}" for n in range(6)]
    assert set(whole[0].files) == {"json", "txt", "png"}
    data = path.read_bytes()
    for cut in range(0, len(data) - 1, 41):
        path.write_bytes(data[:cut])
        samples, said = read_until_damage(path)
        assert str(path) in said, cut
        assert_a_prefix(samples, whole)
    for at in range(0, len(data), 41):
        path.write_bytes(data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :])
        samples, said = read_until_damage(path)
        assert said or samples == whole, at  # a flip in the compressor's own header may mean nothing


def test_a_flip_that_only_the_checksum_shows_is_named(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar.gz", pair_members(range(2)), "w:gz")
    data = gzip.decompress(path.read_bytes())
    checksum = zlib.crc32(data).to_bytes(4, "little")
    changed = gzip.compress(data.replace(b"mosaic", b"mosaik"), mtime=0)
    path.write_bytes(changed[:-8] + checksum + changed[-4:])
    assert "CRC" in read_until_damage(path)[1]


def test_tars_joined_with_cat_are_not_half_read_in_silence(tmp_path: Path) -> None:
    one = write_tar(tmp_path / "1.tar", pair_members(range(2))).read_bytes()
    two = write_tar(tmp_path / "2.tar", pair_members(range(2, 4))).read_bytes()
    (tmp_path / "joined.tar").write_bytes(one + two)
    samples, said = read_until_damage(tmp_path / "joined.tar")
    assert len(samples) == 2 and "behind its end mark" in said


@pytest.mark.parametrize("content", [b"", b"<html>404</html>" * 100, bytes(10240)], ids=["no bytes", "html", "zeros"])
def test_what_is_no_tar_or_an_empty_one_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(content)
    assert str(path) in read_until_damage(path)[1]


@pytest.mark.parametrize("name", ["/etc/a.txt", "../a.txt", "x/../../a.txt"])
def test_names_that_leave_their_folder_are_refused(tmp_path: Path, name: str) -> None:
    path = write_tar(tmp_path / "a.tar", [*pair_members(range(1)), (name, b"x")])
    _, said = read_until_damage(path)
    assert name in said and "refused" in said


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE])
def test_links_and_devices_are_refused(tmp_path: Path, kind: bytes) -> None:
    member = tarfile.TarInfo("a.txt")
    member.type, member.linkname = kind, "/etc/passwd"
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.addfile(member)
    assert "'a.txt' is a link" in read_until_damage(tmp_path / "a.tar")[1]


def test_folders_are_passed_and_an_ending_that_repeats_begins_a_new_sample(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        folder = tarfile.TarInfo("./x")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for name in ("./x/a.TXT", "./x/a.png", "./x/a.txt", "./x/a.seg.png"):
            member = tarfile.TarInfo(name)
            member.size = 1
            tar.addfile(member, io.BytesIO(name[-1:].encode()))
    assert list(read_foreign(tmp_path / "a.tar")) == [
        Sample("./x/a", {"txt": b"T", "png": b"g"}),
        Sample("./x/a", {"txt": b"t", "seg.png": b"g"}),
    ]


def test_a_caption_that_is_missing_or_no_text_is_named(tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "a.tar", [Sample("k0", {"png": b""}), Sample("k1", {"txt": b"\xff"})])
    assert shard is not None
    with pytest.raises(ShardError, match=r"a\.tar: sample k0 has no txt, only png"):
        shard.read_text(0)
    with pytest.raises(ShardError, match=r"a\.tar: sample k1 has a txt that is not UTF-8 \(invalid start byte\)"):
        shard.read_text(1)


def test_a_shard_is_open_for_as_long_as_its_reader_wants(tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "a.tar", SAMPLES)
    assert shard is not None
    with shard.open() as file:
        shard.path.unlink()
        at, n = shard.places[2]["txt"]
        file.seek(at)
        assert file.read(n) == b"text 2"


def test_names_are_shown_on_one_line_and_plain_ones_as_they_are() -> None:
    assert shown(Path("a b/\u732b.tar")) == "a b/\u732b.tar"
    assert shown("a\nb\x1b[2J\u2028\x9b\udcff") == r"a\nb\x1b[2J\u2028\x9b\udcff"


def test_any_name_becomes_a_key_that_webdataset_reads(tmp_path: Path) -> None:
    names = ["./0001", "cat/tabby.v2", "bad\udcff", "", "\u732b" * 80, "\u732b" * 79 + "\u72ac", "plain-Key_7"]
    keys = [plain_key(name) for name in names]
    assert keys[0] == "0001" and keys[1] == "cat_tabby_v2" and keys[-1] == "plain-Key_7"
    assert len(set(keys)) == len(names)
    write_shard(tmp_path / "a.tar", [Sample(key, {"webp": b"x", "txt": b"y"}) for key in keys])
    theirs = list(webdataset.WebDataset(str(tmp_path / "a.tar"), shardshuffle=False))
    assert [sample["__key__"] for sample in theirs] == keys
    assert [sample.key for sample in read_foreign(tmp_path / "a.tar")] == keys
