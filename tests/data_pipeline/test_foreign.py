"""Foreign tars: what each kind of damage comes to, and an index that reads them in exact order."""

import hashlib
import json
import os
import subprocess
import sys
import tarfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from cluster.manifest import FolderError
from data_pipeline.foreign import ForeignFolder, index_of, open_foreign
from data_pipeline.loader import ImageBatches, LoaderConfig, Shards
from data_pipeline.preprocess import PreprocessConfig, preprocess
from data_pipeline.remote import CacheConfig
from data_pipeline.shards import Sample, ShardError, plain_key, read_foreign
from tests.pairs import Members, caption, make_pairs, pair_members, write_tar

N = 20  # samples in the tar that is damaged
MIDDLE = 10  # the damage is at the first member of this one, or in it


def good_tar(path: Path) -> Path:
    return write_tar(path, pair_members(range(N)))


def member_of(path: Path, number: int) -> tarfile.TarInfo:
    with tarfile.open(path) as tar:
        return tar.getmembers()[number]


def changed(path: Path, at: int, data: bytes) -> None:
    with open(path, "r+b") as file:
        file.seek(at)
        file.write(data)


def damage(path: Path, kind: str) -> None:
    """Turn a good tar into a bad one."""
    first, picture = member_of(path, 3 * MIDDLE), member_of(path, 3 * MIDDLE + 2)
    members = pair_members(range(N))
    if kind == "bad header":
        changed(path, first.offset + 3, b"\xff")
    elif kind == "cut at a header":
        os.truncate(path, first.offset)
    elif kind == "cut inside a header":
        os.truncate(path, first.offset + 300)
    elif kind == "cut inside data":
        os.truncate(path, picture.offset_data + picture.size // 2)
    elif kind == "zero blocks":
        changed(path, first.offset, bytes(1024))
    elif kind == "bit flip in data":
        changed(path, picture.offset_data + picture.size - 20, b"\x55")
    elif kind == "missing member":
        write_tar(path, [pair for pair in members if pair[0] != f"{MIDDLE:04d}.txt"])
    elif kind == "unsorted":
        write_tar(path, sorted(members, key=lambda pair: (pair[0].endswith("png"), pair[0])))
    elif kind == "duplicate member":
        at = 3 * MIDDLE + 2
        write_tar(path, [*members[:at], members[at - 1], *members[at:]])
    else:
        path.write_bytes({"empty": b"", "HTML": b"<html>404 not found</html>" * 99}[kind])


# kind of damage -> whole samples read before it, what read_foreign says, what index_of says ("" is nothing)
MATRIX = {
    "bad header": (MIDDLE, "no end mark", "no end mark"),
    "cut at a header": (MIDDLE, "no end mark", "no end mark"),
    "cut inside a header": (MIDDLE, "truncated", "truncated"),
    "cut inside data": (MIDDLE, "unexpected end of data", "unexpected end of data"),
    "zero blocks": (MIDDLE, "goes on behind its end mark", "goes on behind its end mark"),
    "empty": (0, "empty file", "empty file"),
    "HTML": (0, "not a tar", "not a tar"),
    "unsorted": (0, "", "sample 0000 are not together"),
    "duplicate member": (N - 1, "", "sample 0010 are not together"),
    "missing member": (N - 1, "", ""),  # the sample lacks it: preprocess counts that, and who reads it is told
    "bit flip in data": (N - 1, "", ""),  # silent: a plain tar has no digest of its data
}


@pytest.mark.parametrize("kind", MATRIX)
def test_every_damage_is_named_but_a_flip_in_data_that_has_no_digest(tmp_path: Path, kind: str) -> None:
    path = good_tar(tmp_path / "a.tar")
    good = list(read_foreign(path))
    damage(path, kind)
    n_whole, said_by_reading, said_by_index = MATRIX[kind]
    samples, said = [], ""
    try:
        for sample in read_foreign(path):
            samples.append(sample)
    except ShardError as error:
        said = str(error)
    assert sum(sample in good for sample in samples) == n_whole
    assert bool(said) == bool(said_by_reading) and said_by_reading in said
    if said_by_index:
        with pytest.raises(ShardError, match=said_by_index) as caught:
            index_of(path, tmp_path / "cache")
        assert str(path) in str(caught.value) and not (tmp_path / "cache").exists()
    else:
        shard = index_of(path, tmp_path / "cache")
        assert [shard.read(number) for number in range(N)] == samples


def test_damage_that_read_foreign_passes_on_is_counted_by_preprocess(tmp_path: Path) -> None:
    expected = {
        "unsorted": {"dropped: no picture": N, "dropped: no caption": N},
        "duplicate member": {"dropped: no picture": 1},
        "missing member": {},  # the caption is then taken from the json
    }
    for kind, dropped in expected.items():
        damage(good_tar(tmp_path / kind / "a.tar"), kind)
        write_tar(tmp_path / kind / "b.tar", pair_members(range(50, 56)))
        config = PreprocessConfig(
            source=str(tmp_path / kind), out=str(tmp_path / f"{kind} out"), vocab_size=300, heldout_fraction=0
        )
        preprocess(config)
        report = Counter(json.loads((tmp_path / f"{kind} out" / "report.json").read_text()))
        assert {fate: n for fate, n in report.items() if fate.startswith("dropped")} == dropped
        assert report["read"] == report["kept: train"] + sum(dropped.values())


def test_a_missing_caption_is_named_by_who_reads_it(tmp_path: Path) -> None:
    damage(good_tar(tmp_path / "a.tar"), "missing member")
    shard = index_of(tmp_path / "a.tar", tmp_path)
    assert "txt" not in shard.read(MIDDLE).files
    with pytest.raises(ShardError, match=r"a\.tar: sample 0010 has no txt, only json, png"):
        shard.read_text(MIDDLE)


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_an_index_reads_what_a_pass_over_the_tar_reads_with_long_names_too(tmp_path: Path, format: int) -> None:
    long = "x" * (200 if format != tarfile.USTAR_FORMAT else 60)
    members: Members = [(f"d/{long}{n}.{e}", os.urandom(400 * n + 1)) for n in range(4) for e in ("jpg", "TXT")]
    with tarfile.open(tmp_path / "a.tar", "w", format=format) as tar:
        for name, data in members:
            (tmp_path / "member").write_bytes(data)
            tar.add(tmp_path / "member", name)
    shard = index_of(tmp_path / "a.tar", tmp_path / "cache")
    expected = [Sample(plain_key(s.key), s.files) for s in read_foreign(tmp_path / "a.tar")]
    assert len(expected) == 4 and set(expected[0].files) == {"jpg", "txt"}
    assert [shard.read(number) for number in range(4)] == expected
    assert [shard.read(number) for number in (3, 0)] == [expected[3], expected[0]]


def test_an_index_is_kept_and_made_again_when_the_tar_changes_or_the_index_is_damaged(tmp_path: Path) -> None:
    path, cache = good_tar(tmp_path / "a.tar"), tmp_path / "cache"
    first = index_of(path, cache)
    (kept,) = cache.iterdir()
    whole, stamp = kept.read_bytes(), kept.stat().st_mtime_ns
    assert index_of(path, cache) == first and kept.stat().st_mtime_ns == stamp
    for bad in (b"", b"{}", whole[:-9], whole.replace(b"0003", b"0004"), b"[" * 99_999 + b"\n1", os.urandom(300)):
        kept.write_bytes(bad)
        assert index_of(path, cache) == first and kept.read_bytes() == whole
    about = path.stat()
    write_tar(path, pair_members(range(30, 30 + N)))
    assert path.stat().st_size == about.st_size
    assert index_of(path, cache).keys == [f"{n:04d}" for n in range(30, 30 + N)]
    assert [file.name for file in cache.iterdir()] == [kept.name]


def test_a_kept_index_is_not_followed_out_of_the_tar(tmp_path: Path) -> None:
    """Written by another program with a right digest: it is refused like a damaged one."""
    path, cache = good_tar(tmp_path / "a.tar"), tmp_path / "cache"
    first = index_of(path, cache)
    (kept,) = cache.iterdir()
    head, body = kept.read_bytes().splitlines()
    values = json.loads(body)
    values["samples"][0][1]["txt"] = [0, 10**12]
    body = json.dumps(values).encode()
    about = json.loads(head) | {"sha256": hashlib.sha256(body).hexdigest()}
    kept.write_bytes(json.dumps(about).encode() + b"\n" + body + b"\n")
    assert index_of(path, cache) == first


def test_no_index_is_ever_seen_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is written is not yet under the name that others read."""
    real, written = Path.write_bytes, []
    monkeypatch.setattr(Path, "write_bytes", lambda self, data: (written.append(self.name), real(self, data))[1])
    path = good_tar(tmp_path / "a.tar")
    index_of(path, tmp_path / "cache")
    (kept,) = (tmp_path / "cache").iterdir()
    assert written and kept.name not in written


RACE = "import sys; from pathlib import Path; from data_pipeline.foreign import open_foreign\n" + (
    "print(sum(len(shard.read(0).files) for shard in open_foreign(sys.argv[1], Path(sys.argv[2]))))"
)


def test_processes_that_index_at_the_same_time_do_not_disturb_each_other(tmp_path: Path) -> None:
    for n in range(30):
        write_tar(tmp_path / "tars" / f"{n:02d}.tar", pair_members(range(n, n + 2)))
    words = [sys.executable, "-c", RACE, str(tmp_path / "tars"), str(tmp_path / "cache")]
    started = [subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE) for _ in range(3)]
    for process in started:
        out, said = process.communicate(timeout=100)
        assert (out.strip(), said) == (b"90", b"")
    assert len(list((tmp_path / "cache").iterdir())) == 30


def test_a_folder_a_pattern_and_a_url_open_the_same_samples_in_the_same_order(tmp_path: Path) -> None:
    for n in (2, 0, 1):
        write_tar(tmp_path / "tars" / f"x{n:03d}.tar", pair_members(range(3 * n, 3 * n + 3)))
    cache = CacheConfig(folder=str(tmp_path / "fetched"))
    sources = [f"{tmp_path}/tars", f"{tmp_path}/tars/x{{000..002}}.tar", f"file://{tmp_path}/tars"]
    for number, source in enumerate(sources):
        shards = open_foreign(source, tmp_path / f"index{number}", cache)
        assert [key for shard in shards for key in shard.keys] == [f"{n:04d}" for n in range(9)]
        assert shards[2].read(1).files == {name[5:]: data for name, data in pair_members(range(7, 8))}
        assert [shard.path.name for shard in shards] == ["x000.tar", "x001.tar", "x002.tar"]


def test_a_remote_tar_is_not_fetched_again_to_be_opened_but_to_be_read(tmp_path: Path) -> None:
    write_tar(tmp_path / "tars" / "a.tar", pair_members(range(3)))
    cache = CacheConfig(folder=str(tmp_path / "fetched"))
    open_foreign(f"file://{tmp_path}/tars", tmp_path / "index", cache)
    for file in (tmp_path / "fetched" / "files").iterdir():
        file.unlink()
    (shard,) = open_foreign(f"file://{tmp_path}/tars", tmp_path / "index", cache)
    assert list((tmp_path / "fetched" / "files").iterdir()) == []
    assert shard.read_text(0) and len(list((tmp_path / "fetched" / "files").iterdir())) == 1


def test_all_damaged_tars_of_a_source_are_named_in_one_line(tmp_path: Path) -> None:
    for n in range(4):
        good_tar(tmp_path / f"{n}.tar")
    for n in (1, 3):
        damage(tmp_path / f"{n}.tar", "cut inside data")
    with pytest.raises(ShardError, match=r"2 of 4 tars cannot be used: .*1\.tar is truncated.*damaged too: 3\.tar$"):
        open_foreign(str(tmp_path), tmp_path / "cache")


@pytest.mark.parametrize("mode", ["w:gz", "w:bz2", "w:xz"])
def test_a_compressed_tar_says_what_to_do(tmp_path: Path, mode: str) -> None:
    path = write_tar(tmp_path / "a.tar", pair_members(range(2)), mode)  # type: ignore[arg-type]
    with pytest.raises(ShardError, match=r"a\.tar is compressed with (gzip|bzip2|xz).*unpack it, or use `smalti prep"):
        index_of(path, tmp_path / "cache")


def test_loose_pictures_and_nothing_say_what_to_do(tmp_path: Path) -> None:
    make_pairs(tmp_path / "pairs", 2)
    with pytest.raises(FolderError, match="pairs holds no tar; pairs in loose files go through `smalti preprocess`"):
        open_foreign(str(tmp_path / "pairs"), tmp_path / "cache")
    with pytest.raises(FolderError, match="nowhere does not exist"):
        open_foreign(str(tmp_path / "nowhere"), tmp_path / "cache")


def sparse(path: Path) -> None:
    """A tar whose one member GNU tar stored with holes."""
    (path.parent / "a.png").write_bytes(b"")
    os.truncate(path.parent / "a.png", 1 << 20)
    words = ["tar", "--sparse", "--format=gnu", "-cf", str(path), "-C", str(path.parent), "a.png"]
    subprocess.run(words, check=True, timeout=60)


def negative(path: Path) -> None:
    """A member of -512 bytes: whoever believes it comes back to the same header for ever."""
    write_tar(path, [("a.png", b"x" * 600)])
    header = bytearray(path.read_bytes()[:512])
    header[124:136] = (2**96 - 512).to_bytes(12, "big")
    header[148:156] = b" " * 8
    header[148:156] = f"{sum(header):06o}\0 ".encode()
    changed(path, 0, bytes(header))


@pytest.mark.parametrize(("make", "said"), [(sparse, "stored with holes"), (negative, "-512 bytes")])
def test_odd_members_are_refused_by_name(tmp_path: Path, make: Callable[[Path], None], said: str) -> None:
    make(tmp_path / "odd.tar")
    for read in (lambda path: list(read_foreign(path)), lambda path: index_of(path, tmp_path / "cache")):
        with pytest.raises(ShardError, match=rf"odd\.tar: member 'a\.png'.*{said}"):
            read(tmp_path / "odd.tar")


def test_batches_come_straight_from_foreign_tars_and_their_fingerprint_is_that_of_what_they_hold(
    tmp_path: Path,
) -> None:
    for n in range(3):
        write_tar(tmp_path / "tars" / f"x{n}.tar", pair_members(range(4 * n, 4 * n + 4)))

    def folder(train: str, heldout: str = "") -> ForeignFolder:
        return ForeignFolder(f"{tmp_path}/{train}", heldout and f"{tmp_path}/{heldout}", tmp_path / "indexes")

    both = folder("tars/x{0..1}.tar", "tars/x2.tar")
    assert both.manifest.counts == {"train": 8, "heldout": 4}
    assert [len(Shards([both], "images", split)) for split in ("train", "heldout")] == [8, 4]
    batch = next(ImageBatches(Shards([both], "images", "train"), LoaderConfig(batch=8), 8, False))
    assert sorted(batch.keys) == [f"{n:04d}" for n in range(8)]
    assert batch.captions == [caption(int(key)) for key in batch.keys] and batch.pixels.shape == (8, 3, 8, 8)
    assert folder("tars").manifest.counts == {"train": 12, "heldout": 0}
    with pytest.raises(FolderError, match="no heldout shards"):
        Shards([folder("tars")], "images", "heldout")
    (tmp_path / "tars").rename(tmp_path / "moved")
    assert folder("moved/x{0..1}.tar", "moved/x2.tar").manifest.fingerprint == both.manifest.fingerprint
    assert folder("moved/x{1..2}.tar", "moved/x0.tar").manifest.fingerprint != both.manifest.fingerprint
