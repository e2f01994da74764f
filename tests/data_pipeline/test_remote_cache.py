"""Files of other machines: fetched once, checked, shared by processes, and evicted when nobody uses them."""

import io
import json
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from cluster.manifest import FolderError, file_digest
from cluster.settings import SettingError
from data_pipeline import remote_cache
from data_pipeline.remote import CacheConfig, RemoteError
from data_pipeline.remote_cache import RemoteFile, RemoteFolder, write_whole
from data_pipeline.shards import ShardError, open_shard
from tests.fetching import Server, cached, content

TIMEOUT = 100  # seconds, for processes of a test that should need two


def test_a_file_is_fetched_once_and_kept_whole(server: Server, cache: CacheConfig) -> None:
    data = bytes(range(256)) * 40_000  # more than two reads
    url = server.write("a b.tar", data).replace(" ", "%20")
    for _ in range(3):
        assert content(RemoteFile(url, cache)) == data
    assert server.asked == {"/a%20b.tar": 1}
    assert cached(cache) == ["a_20b.tar"]
    assert (Path(cache.folder) / "files").stat().st_mode & 0o077 == 0


def test_other_bytes_than_the_manifest_says_are_fetched_once_more_and_then_refused(
    server: Server, cache: CacheConfig, tmp_path: Path
) -> None:
    url = server.write("a.tar", b"right" * 1000)
    digest = file_digest(server.folder / "a.tar")
    server.faults = [b"wrong" * 1000]
    assert content(RemoteFile(url, cache, 5000, digest)) == b"right" * 1000
    assert server.asked["/a.tar"] == 2
    for bad, said in ((b"wrong" * 1000, "sha256"), (b"wrong" * 999, "4995 bytes"), (b"wrong" * 10**6, "5000000 bytes")):
        server.faults, server.asked = [bad] * 9, Counter()
        other = CacheConfig(folder=str(tmp_path / said))
        with pytest.raises(ShardError, match=rf"a\.tar: it has {said}.*twice; .*upload it again"):
            content(RemoteFile(url, other, 5000, digest))
        assert server.asked["/a.tar"] == 2 and cached(other) == []


def test_a_cached_file_that_somebody_cut_is_fetched_again(server: Server, cache: CacheConfig) -> None:
    url = server.write("a.tar", b"x" * 5000)
    file = RemoteFile(url, cache, 5000, file_digest(server.folder / "a.tar"))
    content(file)
    (kept,) = (Path(cache.folder) / "files").iterdir()
    kept.write_bytes(b"x" * 100)
    assert content(file) == b"x" * 5000 and server.asked["/a.tar"] == 2


def test_least_recently_used_make_room_but_nothing_open_and_nothing_of_others(
    server: Server, cache: CacheConfig
) -> None:
    small = CacheConfig(folder=cache.folder, gb=3_500 / 1e9)
    files = [RemoteFile(server.write(f"{n}.tar", bytes([n]) * 1000), small) for n in range(6)]
    (small.made("files") / "notes.txt").write_bytes(b"mine" * 9999)
    for n in (0, 1, 2):
        content(files[n])
        time.sleep(0.02)  # times of use must differ on a clock of 10 ms
    content(files[0])
    content(files[3])
    assert cached(cache) == ["", "0.tar", "2.tar", "3.tar"]
    with files[2].open() as oldest:
        time.sleep(0.02)
        for n in (0, 3, 4, 5):
            content(files[n])
            time.sleep(0.02)
        assert cached(cache) == ["", "2.tar", "4.tar", "5.tar"]
        assert oldest.read() == bytes([2]) * 1000
    content(files[0])
    assert cached(cache) == ["", "0.tar", "4.tar", "5.tar"]
    assert (small.made("files") / "notes.txt").read_bytes() == b"mine" * 9999


def test_a_file_larger_than_the_cache_names_the_setting(server: Server, cache: CacheConfig) -> None:
    url = server.write("a.tar", b"x" * 5000)
    with pytest.raises(RemoteError, match=r"a\.tar is larger than the whole cache: raise cache\.gb"):
        content(RemoteFile(url, CacheConfig(folder=cache.folder, gb=4_000 / 1e9)))
    assert cached(cache) == []
    for wrong in ({"gb": 0.0}, {"tries": 0}, {"timeout": 0}):
        with pytest.raises(SettingError, match=r"cache\."):
            CacheConfig(**wrong)  # type: ignore[arg-type]


def test_an_answer_without_length_is_bounded_and_makes_room_too(server: Server, cache: CacheConfig) -> None:
    small = CacheConfig(folder=cache.folder, gb=3_500 / 1e9)
    urls = [server.write(f"{n}.tar", bytes([n]) * 2000) for n in range(2)]
    for url in urls:
        server.faults = ["no length"]
        content(RemoteFile(url, small))
    assert cached(cache) == ["1.tar"]
    server.faults = ["endless"]
    with pytest.raises(RemoteError, match=r"2\.tar is larger than the whole cache"):
        content(RemoteFile(f"{server.url}/2.tar", small))
    server.faults = ["endless"] * 2
    with pytest.raises(ShardError, match=r"2\.tar: it has .* bytes, its manifest says 2000, twice"):
        content(RemoteFile(f"{server.url}/2.tar", cache, 2000, "0" * 64))
    assert cached(cache) == ["1.tar"]


def test_two_writers_of_one_file_do_not_mix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second writes its whole file while the first has not yet put its own in place."""
    real, path = Path.write_bytes, tmp_path / "a.json"
    others = [b"second" * 1000]

    def write_bytes(self: Path, data: bytes) -> int:
        n_bytes = real(self, data)
        while others:
            write_whole(path, others.pop())
        return n_bytes

    monkeypatch.setattr(Path, "write_bytes", write_bytes)
    write_whole(path, b"first" * 900)
    assert path.read_bytes() == b"first" * 900 and list(tmp_path.iterdir()) == [path]


FETCH = (
    "import sys; from data_pipeline.remote_cache import RemoteFile; from data_pipeline.remote import CacheConfig\n"
    "print(len(RemoteFile(sys.argv[1], CacheConfig(folder=sys.argv[2])).open().read()))"
)


def start_fetch(url: str, cache: CacheConfig) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-W", "ignore", "-c", FETCH, url, cache.folder], stdout=subprocess.PIPE)


def test_processes_of_a_host_fetch_a_file_once(server: Server, cache: CacheConfig) -> None:
    url = server.write("a.tar", b"x" * 10**6)
    server.pause = 0.5  # the others come while one is fetching
    started = [start_fetch(url, cache) for _ in range(3)]
    assert [process.communicate(timeout=TIMEOUT)[0].strip() for process in started] == [b"1000000"] * 3
    assert server.asked == {"/a.tar": 1} and cached(cache) == ["a.tar"]


def test_a_killed_process_leaves_nothing_that_others_wait_for(server: Server, cache: CacheConfig) -> None:
    url = server.write("a.tar", b"x" * 10**6)
    server.pause = 5.0
    process = start_fetch(url, cache)
    deadline = time.monotonic() + TIMEOUT
    while not server.asked and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    process.wait(timeout=TIMEOUT)
    process.stdout.close()  # type: ignore[union-attr]
    assert cached(cache) == ["a.tar.part"]
    server.pause = 0.0
    assert content(RemoteFile(url, cache)) == b"x" * 10**6
    assert cached(cache) == ["a.tar"]


def test_a_full_disk_is_named_and_no_fault_of_the_source(
    server: Server, cache: CacheConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = server.write("a.tar", b"x" * 5000)

    class Full(io.BytesIO):
        name = "cache/a.tar.part"

        def write(self, data: Any) -> int:
            raise OSError(28, "No space left on device")

    real = remote_cache._write
    monkeypatch.setattr(remote_cache, "_write", lambda file, chunk: real(Full(), chunk))
    with pytest.raises(OSError, match=r"No space left on device: 'cache/a\.tar\.part'"):
        content(RemoteFile(url, cache))
    assert server.asked["/a.tar"] == 1 and cached(cache) == []


def test_a_file_ahead_of_use_is_fetched_in_a_thread_once_and_its_faults_are_left_to_its_user(
    server: Server, cache: CacheConfig
) -> None:
    file = RemoteFile(server.write("a.tar", b"x"), cache)
    gone = RemoteFile(f"{server.url}/gone.tar", cache)
    server.pause = 0.2
    for _ in range(20):
        file.prefetch()
        gone.prefetch()
    deadline = time.monotonic() + TIMEOUT
    while remote_cache._begun and time.monotonic() < deadline:
        time.sleep(0.01)
    assert cached(cache) == ["a.tar"] and server.asked == {"/a.tar": 1, "/gone.tar": 1}
    assert content(file) == b"x" and server.asked["/a.tar"] == 1
    with pytest.raises(ShardError, match="gone.tar is not there"):
        content(gone)


@pytest.fixture
def images(data: Path, server: Server) -> Path:
    return Path(shutil.copytree(data / "images", server.folder / "images"))


def test_a_remote_folder_gives_the_shards_of_the_local_one_and_fetches_tars_when_they_are_read(
    images: Path, server: Server, cache: CacheConfig
) -> None:
    folder = RemoteFolder(f"{server.url}/images/", "images", cache)
    for split in ("train", "heldout"):
        local = [open_shard(path) for path in sorted(images.glob(f"{split}-*.tar"))]
        shards = folder.shards(split)
        assert [(shard.keys, shard.places) for shard in shards] == [(shard.keys, shard.places) for shard in local]
        assert [shard.path.name for shard in shards] == [shard.path.name for shard in local]
        if split == "train":
            assert not [name for name in server.asked if name.endswith(".tar")]
            assert shards[1].read(0) == local[1].read(0) and shards[1].read_text(1) == local[1].read_text(1)
            assert {name: n for name, n in server.asked.items() if name.endswith(".tar")} == {
                "/images/train-000001.tar": 1
            }
    server.asked.clear()
    again = RemoteFolder(f"{server.url}/images", "images", cache)
    assert again.manifest == folder.manifest and len(again.shards("train")) == len(folder.shards("train"))
    assert server.asked == {"/images/manifest.json": 1}


def test_a_shard_ahead_of_use_is_there_when_it_is_read(images: Path, server: Server, cache: CacheConfig) -> None:
    shard = RemoteFolder(f"file://{images}", "images", cache).shards("train")[0]
    shard.prefetch()
    deadline = time.monotonic() + TIMEOUT
    while remote_cache._begun and time.monotonic() < deadline:
        time.sleep(0.01)
    assert cached(cache) == ["train-000000.tar"]
    open_shard(images / "train-000000.tar").prefetch()  # of a local shard: nothing


@pytest.mark.parametrize(
    ("file", "bad", "said"),
    [
        ("train-000000.json", b"{", r"train-000000\.json is damaged"),
        ("train-000000.json", b'{"bytes": 1, "sha256": ""}', r"the index of another train-000000\.tar"),
        ("train-000000.json", b"[" * 99_999, r"train-000000\.json is damaged"),
        ("manifest.json", b"{}", r"manifest\.json is damaged"),
        ("manifest.json", b"[" * 99_999, "recursion"),
    ],
)
def test_a_damaged_remote_folder_is_named(
    images: Path, server: Server, cache: CacheConfig, file: str, bad: bytes, said: str
) -> None:
    (images / file).write_bytes(bad)
    with pytest.raises(FolderError, match=said) as caught:
        RemoteFolder(f"{server.url}/images", "images", cache).shards("train")
    assert f"{server.url}/images" in str(caught.value)


@pytest.mark.parametrize("name", ["../../stolen-000000.tar", "/etc/train-0.tar", "..", "a\n.tar"])
def test_a_manifest_cannot_name_files_outside_of_its_folder(
    images: Path, server: Server, cache: CacheConfig, name: str
) -> None:
    manifest = json.loads((images / "manifest.json").read_text())
    manifest["files"][name] = {"bytes": 1, "sha256": "0" * 64}
    (images / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(FolderError, match=r"manifest\.json has a wrong row for"):
        RemoteFolder(f"{server.url}/images", "images", cache)


def test_a_missing_remote_folder_is_named(server: Server, cache: CacheConfig) -> None:
    with pytest.raises(ShardError, match=r"nowhere/manifest\.json is not there"):
        RemoteFolder(f"{server.url}/nowhere", "images", cache)
