"""Which pieces of a stage's work this process does, and what is said of the pieces that nobody has done."""

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_context, parent_process
from typing import Any, TypeVar

from cluster.command import shown
from cluster.manifest import FolderError
from cluster.process import Place
from cluster.settings import SettingError, UserError

T = TypeVar("T")
R = TypeVar("R")
NAMED = 5  # missing pieces that an error names


def check_share(tasks: int, task: int) -> None:
    """SettingError unless `task` is one of `tasks`, or both are left out (0 and -1); merging has tasks without task."""
    if tasks < 0:
        raise SettingError(f"tasks={tasks} must be at least 0")
    if task != -1 and not 0 <= task < tasks:
        raise SettingError(f"task={task} must be from 0 to tasks-1, and tasks={tasks}")


def share_of(pieces: Sequence[T], tasks: int, task: int, place: Place) -> list[T]:
    """The pieces of task `task` of `tasks`, or with tasks=0 of this rank; a task's ranks divide its pieces.

    Every n-th piece, so that shares are alike in size and neighbours in the input go to different processes. Which
    are a task's does not depend on how many ranks it has.
    SettingError if there are tasks and none of them was named.
    """
    if tasks and task < 0:
        raise SettingError(f"tasks={tasks} needs task=0 to task={tasks - 1}, the share to do now")
    return list(pieces[max(task, 0) :: max(tasks, 1)][place.rank :: place.world_size])


@contextmanager
def said_by_each_rank(place: Place) -> Iterator[None]:
    """Errors of work that ranks do apart: the rank that meets one says it, where rank 0 speaks for all else."""
    try:
        yield
    except (FolderError, SettingError) as error:
        if place.is_main:
            raise
        raise UserError(str(error)) from None


def refuse_gaps(missing: dict[int, str], n_pieces: int, verb: str, tasks: int) -> None:
    """FolderError naming the first of the missing pieces (number -> name), and the command that makes them."""
    if not missing:
        return
    names = ", ".join(shown(name) for name in list(missing.values())[:NAMED])
    more = f" and {len(missing) - NAMED} more" if len(missing) > NAMED else ""
    todo = sorted({number % tasks for number in missing}) if tasks else []
    which = f" tasks={tasks} and task={','.join(map(str, todo[:NAMED]))}{',...' if todo[NAMED:] else ''}"
    raise FolderError(
        f"{len(missing)} of {n_pieces} shards are not made: {names}{more}; "
        f"run `smalti {verb}` with the same words{which if tasks else ''}"
    )


def in_processes(work: Callable[..., R], jobs: Sequence[tuple[Any, ...]], workers: int) -> Iterator[R]:
    """What `work` makes of each job, as they are done; here in this process with one worker. UserError if one dies.

    Workers end with this process, however it ends.
    """
    if workers == 1 or len(jobs) < 2:
        yield from (work(*job) for job in jobs)
        return
    pool = ProcessPoolExecutor(min(workers, len(jobs)), get_context("spawn"), _end_with_parent)
    try:
        for done in as_completed([pool.submit(work, *job) for job in jobs]):
            yield done.result()
    except BrokenProcessPool:
        raise UserError(
            "a worker was killed (out of memory?); run the same command again, with fewer workers"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _end_with_parent() -> None:
    """In a worker: leave when the parent is gone; a killed one tells nobody, and the queue of jobs never ends."""

    def watch() -> None:
        if parent := parent_process():
            parent.join()
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
