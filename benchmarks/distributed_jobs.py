"""What the rows of benchmarks/distributed.py share: what a row tells, and how its processes are started and ended."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Row:
    """One measured claim; at_least tells on which side of the bar it should be. No value: the note says why."""

    what: str
    value: float | None
    bar: float
    at_least: bool
    note: str
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        if self.value is None:
            return False
        return self.value >= self.bar if self.at_least else self.value <= self.bar


class Failed(Exception):
    """A process of a row failed, or took too long; the text is one line."""


def environment(more: Mapping[str, str] | None = None) -> dict[str, str]:
    """One thread a process: ranks share the machine's cores, and more threads would only wait for each other."""
    ours = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    return os.environ | ours | dict(more or {})


def answers(commands: Sequence[Sequence[str]], seconds: float) -> list[str]:
    """What commands that run side by side print. All are ended, with their children, when one fails or time is up.

    Raises Failed with the end of what the first of them to fail complained of.
    """
    jobs = [
        subprocess.Popen(
            list(words), cwd=ROOT, env=environment(), text=True, start_new_session=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for words in commands
    ]  # fmt: skip
    printed = []
    try:
        for job in jobs:
            out, complaint = job.communicate(timeout=seconds)
            if job.returncode:
                raise Failed(cause_in(complaint) or f"ended with exit code {job.returncode}")
            printed.append(out)
    except subprocess.TimeoutExpired:
        raise Failed(f"took longer than {seconds:g} s") from None
    finally:
        for job in jobs:
            end(job)
    return printed


def end(job: subprocess.Popen[str]) -> None:
    """Kill a job's whole session, if anything of it is left."""
    try:
        os.killpg(job.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    job.communicate()


def cause_in(complaint: str) -> str:
    """The line of stderr that names an error, or its last one."""
    lines = [line.strip() for line in complaint.splitlines() if line.strip()]
    named = [line for line in lines if "Error" in line or "Exception" in line]
    return (named or lines or [""])[0 if named else -1]


def last_json(printed: str) -> Any:
    """What the last line says that is a JSON object; Failed if none is."""
    lines = [line for line in printed.splitlines() if line.startswith("{")]
    if not lines:
        raise Failed("answered nothing")
    return json.loads(lines[-1])


def ranks(count: int, words: Sequence[str], seconds: float) -> Any:
    """The answer of `count` processes of a module on this machine, told by rank 0."""
    launch = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(count), "-m", *words]
    return last_json(answers([[sys.executable, "-m", *launch]], seconds)[0])
