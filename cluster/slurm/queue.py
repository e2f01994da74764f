"""What became of the jobs that were submitted for a folder, as far as SLURM still knows."""

import shutil
from collections import Counter
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from cluster.records import read_records
from cluster.settings import UserError
from cluster.slurm.job import JOBS, ask_slurm

OVER = {
    "COMPLETED", "CANCELLED", "FAILED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "BOOT_FAIL", "DEADLINE", "OUT_OF_MEMORY",
    "REVOKED",
}  # fmt: skip


@dataclass(frozen=True)
class Submitted:
    """A line of the record that `submit` keeps."""

    job: str
    name: str
    array: int
    time: float


@dataclass(frozen=True)
class State:
    """Of a job, or of all tasks of an array: how many are in which, and why those wait that do."""

    tasks: dict[str, int]
    reason: str = ""

    @property
    def is_over(self) -> bool:
        return self.tasks.keys() <= OVER

    def __str__(self) -> str:
        names = [state.lower() if n == 1 else f"{n} {state.lower()}" for state, n in sorted(self.tasks.items())]
        return ", ".join(names) + (f" ({self.reason})" if self.reason else "")


def submitted(folder: Path) -> list[Submitted]:
    """Jobs submitted for a folder, oldest first. A damaged line is passed over: it is a record, not an input."""
    found = []
    for record in read_records(folder / JOBS):
        with suppress(TypeError):  # of other fields
            found.append(Submitted(**record))
    return found


def newest(jobs: list[Submitted]) -> list[Submitted]:
    """The last job of each name."""
    return list({job.name: job for job in jobs}.values())


def refuse_twice(folder: Path, name: str = "", after: Collection[str] = ()) -> None:
    """UserError if jobs submitted for a folder, or those of one name, wait or run: two must not write at once.

    What comes after the last of them is none of these two, for that one came after those before.
    """
    jobs = [job.job for job in submitted(folder) if name in ("", job.name)]
    known = states(jobs)
    alive = [job for job in jobs if job in known and not known[job].is_over]
    if alive and alive[-1] not in after:
        chain = f", or submit with after={alive[-1]}" if name else ""
        raise UserError(f"{folder}: jobs of it wait or run: wait for them, or `scancel {' '.join(alive)}`{chain}")


def states(numbers: list[str]) -> dict[str, State]:
    """The state of each job that SLURM still knows; none where there is no SLURM. UserError if it gives no answer."""
    if not numbers or not shutil.which("squeue"):
        return {}
    words = ["squeue", "--noheader", "--array", "--states=all", f"--jobs={','.join(numbers)}", "--format=%F|%T|%r"]
    try:
        lines = ask_slurm(words).splitlines()
    except UserError as error:
        if "Invalid job id" in str(error):  # SLURM forgets jobs some minutes after their end
            return {}
        raise
    counts: dict[str, Counter[str]] = {}
    reasons: dict[str, str] = {}
    for number, state, reason in (line.strip().split("|", 2) for line in lines):
        counts.setdefault(number, Counter())[state] += 1
        if state == "PENDING":
            reasons[number] = reason
    return {number: State(dict(tasks), reasons.get(number, "")) for number, tasks in counts.items()}
