"""Processes that tests start: killed at a byte of their files, or joined as the ranks of a job."""

import multiprocessing
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

FORK = multiprocessing.get_context("fork")


def in_child(work: Callable[[], None], limit: int = 0) -> Any:
    """Start `work` in a process of its own, which is killed when a file of its grows beyond `limit` bytes."""

    def run() -> None:
        torch.set_num_threads(1)  # a fork has lost its parent's threads: OpenMP would wait for them for ever
        if limit:
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        work()

    child = FORK.Process(target=run)
    child.start()
    return child


def ended(child: Any) -> int:
    child.join(60)
    assert child.exitcode is not None
    return child.exitcode


def run_ranks(commands: list[list[str]]) -> tuple[list[int], list[tuple[str, str]]]:
    """One process a command, as a launcher runs the ranks of a job; exit codes, and what each wrote to both streams.

    They meet at a store of ours: nobody can take its port before they listen there.
    """
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    job = {"WORLD_SIZE": str(len(commands)), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
    job |= {"TORCHELASTIC_USE_AGENT_STORE": "True"}
    ranks = [
        subprocess.Popen(
            [sys.executable, *command], text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env=os.environ | job | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank, command in enumerate(commands)
    ]  # fmt: skip
    try:
        said = [rank.communicate(timeout=120) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    return [rank.returncode for rank in ranks], said
