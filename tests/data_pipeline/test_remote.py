"""URLs in, bytes out: faults that may pass are tried again, others given up, all in one line."""

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import fsspec
import pytest

from cluster.manifest import FolderError
from data_pipeline import remote
from data_pipeline.preprocess import PreprocessConfig, preprocess
from data_pipeline.remote import CacheConfig, RemoteError, find_tars
from data_pipeline.remote_cache import RemoteFile
from data_pipeline.shards import ShardError, read_foreign
from data_pipeline.sources import find_parts, read_part
from tests.fetching import Server, cached, content
from tests.pairs import make_pairs, pair_members, write_tar

TIMEOUT = 100  # seconds, for processes of a test that should need two


@pytest.mark.parametrize("fault", [503, 429, "drop", "cut"])
def test_a_fault_that_may_pass_is_tried_again_and_said(
    server: Server, cache: CacheConfig, fault: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    url = server.write("a.tar", b"x" * 9_000)
    server.faults = [fault, fault]
    assert content(RemoteFile(url, cache)) == b"x" * 9_000
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2 and all(line.startswith(f"smalti: {url}: ") and "trying again" in line for line in said)


def test_attempts_are_bounded_and_their_pauses_double(
    server: Server, cache: CacheConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(remote, "FIRST_WAIT", 8.0)
    monkeypatch.setattr(remote.time, "sleep", pauses.append)
    url = server.write("a.tar", b"x")
    server.faults = [503] * 99
    config = CacheConfig(folder=cache.folder, tries=6)
    with pytest.raises(RemoteError, match=r"a\.tar could not be fetched in 6 attempts: .*503.*cache\.tries"):
        content(RemoteFile(url, config))
    assert server.asked["/a.tar"] == 6
    assert [pause for pause in pauses if pause] == [8, 16, 32, 60, 60]  # the server's own pauses are 0
    assert cached(cache) == []


@pytest.mark.parametrize(
    ("fault", "kind", "said"), [(404, ShardError, "is not there"), (403, RemoteError, "cannot be read")]
)
def test_what_will_not_pass_is_asked_for_once(
    server: Server, cache: CacheConfig, fault: int, kind: type[Exception], said: str
) -> None:
    url = server.write("a.tar", b"x")
    server.faults = [fault]
    with pytest.raises(kind, match=said):
        content(RemoteFile(url, cache))
    assert server.asked["/a.tar"] == 1 and cached(cache) == []


def test_pairs_by_url_come_out_of_preprocess_as_from_the_disk(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for n in range(3):
        write_tar(server.folder / f"x{n:03d}.tar", pair_members(range(4 * n, 4 * n + 4)))
    for source, out in ((str(server.folder), "local"), (f"{server.url}/x{{000..002}}.tar", "fetched")):
        preprocess(PreprocessConfig(source=source, out=str(tmp_path / out), vocab_size=300, heldout_fraction=0))
    for name in ("train-000000", "train-000001", "train-000002"):
        for ending in ("tar", "json"):
            local, fetched = (tmp_path / out / "images" / f"{name}.{ending}" for out in ("local", "fetched"))
            assert local.read_bytes() == fetched.read_bytes()
    assert server.asked == {f"/x{n:03d}.tar": 1 for n in range(3)}
    assert len(list((tmp_path / ".cache" / "smalti" / "files").iterdir())) == 3


def test_the_next_tar_is_fetched_while_one_is_read(server: Server, cache: CacheConfig) -> None:
    for n in range(3):
        write_tar(server.folder / f"{n}.tar", pair_members(range(n, n + 1)))
    part = find_parts(f"{server.url}/{{0..2}}.tar", 5, "train", cache)[0]
    next(read_part(part))
    deadline = time.monotonic() + TIMEOUT
    while cached(cache) != ["0.tar", "1.tar"] and time.monotonic() < deadline:
        time.sleep(0.01)
    assert server.asked == {"/0.tar": 1, "/1.tar": 1}


def test_damage_of_a_remote_tar_is_named_by_its_url(server: Server, cache: CacheConfig) -> None:
    url = server.write("a.tar", b"<html>")
    (part,) = find_parts(url, 5, "train", cache)
    with pytest.raises(ShardError, match=rf"^{url} is truncated or not a tar"):
        list(read_part(part))


def test_any_protocol_of_fsspec_is_a_source_and_folders_are_listed(tmp_path: Path, cache: CacheConfig) -> None:
    memory = fsspec.filesystem("memory")
    for n in (1, 0):
        with memory.open(f"/pairs/sub/{n}.tar", "wb") as file:
            file.write(write_tar(tmp_path / "a.tar", pair_members(range(n, n + 1))).read_bytes())
    with memory.open("/pairs/notes.txt", "wb") as file:
        file.write(b"no tar")
    try:
        assert find_tars("memory://pairs", cache) == ["memory:///pairs/sub/0.tar", "memory:///pairs/sub/1.tar"]
        parts = find_parts("memory://pairs", 5, "train", cache)
        assert [[sample.key for sample in read_part(part)] for part in parts] == [["0000"], ["0001"]]
        assert cached(cache) == ["0.tar", "1.tar"]
        with pytest.raises(FolderError, match="memory://nowhere holds no tar"):
            find_parts("memory://nowhere", 5, "train", cache)
        with pytest.raises(ShardError, match="gone.tar is not there"):
            content(RemoteFile("memory://pairs/gone.tar", cache))
    finally:
        memory.rm("/pairs", recursive=True)


def test_what_cannot_be_a_source_says_what_to_do(cache: CacheConfig) -> None:
    for source, said in (
        ("pipe:cat a.tar", "runs no shell commands; name a file, or a URL"),
        ("simplecache::s3://a/b.tar", r"chained URLs \(::\) are not read"),
        ("nosuch://a/b.tar", r"nosuch.*pip install 'smalti\[remote\]'"),
        ("zip://a.tar::http://a/b.zip", r"chained URLs \(::\) are not read"),
        ("http://[1/a.tar", "is no URL"),
        ("https://a/folder", r"http lists no folders; name the tars: https://a/folder/x\{000\.\.041\}\.tar"),
    ):
        with pytest.raises((FolderError, RemoteError), match=said):
            for part in find_parts(source, 5, "train", cache):
                list(read_part(part))


def test_a_password_or_signature_in_a_url_is_not_printed(server: Server, cache: CacheConfig) -> None:
    host = server.url.removeprefix("http://")
    server.faults = [403]
    with pytest.raises(RemoteError) as caught:
        content(RemoteFile(f"http://me:secret@{host}/a.tar?signature=secret", cache))
    assert "secret" not in str(caught.value) and f"http://{host}/a.tar?..." in str(caught.value)


def test_fsspec_is_loaded_at_first_use_and_not_for_http(server: Server) -> None:
    url = server.write("a.tar", b"x")
    fetch = "import sys; from data_pipeline.remote import CacheConfig, fetch_bytes\n" + (
        "print(len(fetch_bytes(sys.argv[1], CacheConfig())), 'fsspec' in sys.modules)"
    )
    words = [sys.executable, "-W", "ignore", "-c", fetch, url]
    done = subprocess.run(words, capture_output=True, text=True, timeout=TIMEOUT, check=True)
    assert done.stdout.split() == ["1", "False"]


def test_a_remote_tar_is_read_while_the_cache_is_full_of_others(server: Server, cache: CacheConfig) -> None:
    """Two parts read in turns, in a cache that holds one: what is open stays, so neither is lost."""
    for n in range(2):
        write_tar(server.folder / f"{n}.tar", pair_members(range(5 * n, 5 * n + 5)))
    size = (server.folder / "0.tar").stat().st_size
    small = CacheConfig(folder=cache.folder, gb=1.5 * size / 1e9)
    parts = find_parts(f"{server.url}/{{0..1}}.tar", 5, "train", small)
    pairs = list(zip(read_part(parts[0]), read_part(parts[1]), strict=True))
    whole = [list(read_foreign(server.folder / f"{n}.tar")) for n in range(2)]
    assert pairs == list(zip(*whole, strict=True))


def test_loose_pictures_are_not_looked_for_on_other_machines(tmp_path: Path, cache: CacheConfig) -> None:
    make_pairs(tmp_path / "pairs", 1)
    with pytest.raises(FolderError, match="loose pictures are read from folders of this machine only"):
        find_parts(f"file://{tmp_path}/pairs", 5, "train", cache)
