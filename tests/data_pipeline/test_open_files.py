"""Open files: few at a time, closed when dropped, opened anew after an error, safe among threads."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from data_pipeline.folders import Shards
from data_pipeline.open_files import OpenFiles
from data_pipeline.shards import Shard, ShardError
from tests.data_pipeline.token_folders import token_sample, write_tokens


@pytest.fixture
def shards(tmp_path: Path) -> list[Shard]:
    return Shards(write_tokens(tmp_path / "tokens", [4] * 6), "tokens", "train").shards


def open_tars() -> int:
    links = [f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd")]
    return sum(os.path.exists(link) and os.readlink(link).endswith(".tar") for link in links)


def test_samples_are_those_of_the_shards(shards: list[Shard]) -> None:
    files = OpenFiles(2)
    for n in (5, 0, 5, 23, 1, 22, 6):
        assert files.read(shards[n // 4], n % 4) == token_sample(n).files == shards[n // 4].read(n % 4).files


def test_no_more_files_are_open_than_allowed_and_none_is_left(shards: list[Shard]) -> None:
    before = open_tars()
    files = OpenFiles(3)
    for n in range(24):
        files.read(shards[n % 6], n // 6)
        assert open_tars() - before == len(files) <= 3
    del files
    assert open_tars() == before


def test_a_file_is_opened_once_while_it_is_in_use(shards: list[Shard], monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    real = Shard.open
    monkeypatch.setattr(Shard, "open", lambda shard: (opened.append(shard.path.name), real(shard))[1])
    files = OpenFiles(2)
    for shard in (0, 1, 0, 0, 2, 0, 1):
        files.read(shards[shard], 0)
    assert [name[9:12] for name in opened] == ["000", "001", "002", "001"]


def test_an_error_is_tried_once_more_with_the_file_opened_anew(
    shards: list[Shard], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a stale handle: the old file is gone from a network disk and another stands in its place."""
    files = OpenFiles()
    files.read(shards[0], 0)
    real, asked = os.pread, []

    def stale_first(fd: int, n: int, at: int) -> bytes:
        asked.append(fd)
        if len(asked) == 1:
            raise OSError(116, "Stale file handle")
        return real(fd, n, at)

    monkeypatch.setattr("data_pipeline.open_files.os.pread", stale_first)
    assert files.read(shards[0], 1) == token_sample(1).files
    assert len(asked) == 2


def test_a_tar_that_was_cut_names_the_member(shards: list[Shard]) -> None:
    at, n_bytes = shards[0].places[2]["txt"]
    os.truncate(shards[0].path, at + n_bytes - 1)
    files = OpenFiles()
    assert files.read(shards[0], 1) == token_sample(1).files
    with pytest.raises(ShardError, match="txt is cut: the tar ends before it"):
        files.read(shards[0], 2)


def test_threads_read_what_one_thread_reads(shards: list[Shard]) -> None:
    files = OpenFiles(2)
    numbers = [n * 7 % 24 for n in range(2000)]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda n: files.read(shards[n // 4], n % 4), numbers))
    assert found == [token_sample(n).files for n in numbers]
