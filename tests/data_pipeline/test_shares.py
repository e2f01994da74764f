"""Work is divided so that every piece has one owner, and the shares are alike."""

import os
import select
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch

from cluster.manifest import FolderError
from cluster.process import Place
from cluster.settings import UserError
from data_pipeline.shares import in_processes, refuse_gaps, share_of

CPU = torch.device("cpu")


@pytest.mark.parametrize(("tasks", "ranks"), [(0, 1), (0, 3), (1, 1), (4, 1), (8, 1), (3, 2), (20, 1)])
def test_every_piece_has_one_owner_and_shares_differ_by_one_at_most(tasks: int, ranks: int) -> None:
    pieces = list(range(17))
    shares = [
        share_of(pieces, tasks, task, Place(rank, ranks, CPU))
        for task in (range(tasks) if tasks else [-1])
        for rank in range(ranks)
    ]
    assert Counter(piece for share in shares for piece in share) == Counter(pieces)
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_a_share_depends_on_numbers_alone() -> None:
    assert share_of("abcdefg", 3, 1, Place(0, 1, CPU)) == ["b", "e"]
    assert share_of("abcdefg", 0, -1, Place(1, 3, CPU)) == ["b", "e"]


def test_a_task_has_the_same_pieces_whatever_its_number_of_ranks() -> None:
    """So a gap can be told by its task, whatever ranks the tasks had."""
    for task in range(3):
        ranks = [share_of(range(17), 3, task, Place(rank, 2, CPU)) for rank in range(2)]
        assert sorted(ranks[0] + ranks[1]) == share_of(range(17), 3, task, Place(0, 1, CPU)) == list(range(17))[task::3]
    with pytest.raises(FolderError, match=r"task=1$"):
        refuse_gaps(dict.fromkeys(share_of(range(8), 2, 1, Place(0, 2, CPU)), "x"), 8, "tokenise", 2)


@pytest.mark.parametrize(
    ("missing", "tasks", "said"),
    [
        ({3: "c"}, 0, "1 of 9 shards are not made: c; run `smalti tokenise` with the same words"),
        ({3: "c"}, 2, "1 of 9 shards are not made: c; run `smalti tokenise` with the same words tasks=2 and task=1"),
        (
            {n: f"s{n}" for n in range(7)},
            8,
            "7 of 9 shards are not made: s0, s1, s2, s3, s4 and 2 more; "
            "run `smalti tokenise` with the same words tasks=8 and task=0,1,2,3,4,...",
        ),
    ],
)
def test_gaps_are_named_with_the_tasks_that_fill_them(missing: dict[int, str], tasks: int, said: str) -> None:
    with pytest.raises(FolderError) as error:
        refuse_gaps(missing, 9, "tokenise", tasks)
    assert str(error.value) == said
    refuse_gaps({}, 9, "tokenise", tasks)


def test_a_worker_that_dies_is_one_line() -> None:
    with pytest.raises(UserError, match="a worker was killed"):
        list(in_processes(os._exit, [(1,), (1,)], 2))


def linger(pipe: Path) -> None:
    """A job that says in a pipe that it has begun, and holds the pipe open for as long as its process lives."""
    with pipe.open("wb", buffering=0) as file:
        file.write(b"x")
        time.sleep(120)


PARENT = """
from pathlib import Path
from data_pipeline.shares import in_processes
from tests.data_pipeline.test_shares import linger
list(in_processes(linger, [(Path({pipe!r}),)] * 2, 2))
"""


def test_workers_end_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    parent = subprocess.Popen([sys.executable, "-c", PARENT.format(pipe=str(pipe))])
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        begun = b""
        while len(begun) < 2:
            assert select.select([reader], [], [], 60)[0], "the workers did not begin"
            assert (said := os.read(reader, 2)), "the workers ended by themselves"
            begun += said
    finally:
        parent.kill()
        parent.wait()
    assert select.select([reader], [], [], 30)[0], "a worker is still there"
    assert os.read(reader, 1) == b""  # nobody holds it open any more
    os.close(reader)
