"""Fixtures of tests that fetch: a server on this machine and an empty cache."""

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from data_pipeline import remote
from data_pipeline.remote import CacheConfig
from tests.fetching import Server


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A server of the folder `there`; nobody waits before asking it again."""
    monkeypatch.setattr(remote, "FIRST_WAIT", 0.0)
    (tmp_path / "there").mkdir()
    with Server(tmp_path / "there") as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield running
        running.shutdown()
        thread.join()


@pytest.fixture
def cache(tmp_path: Path) -> CacheConfig:
    return CacheConfig(folder=str(tmp_path / "cache"), tries=3, timeout=20)
