"""Work is divided so that every piece has one owner, and the shares are alike."""

import os
from collections import Counter

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
    assert share_of("abcdefgh", 2, 1, Place(1, 2, CPU)) == ["d", "h"]


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
