"""What the rows of benchmarks/distributed.py share: what a row tells, and how its processes are started and ended."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any

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


def environment() -> dict[str, str]:
    """One thread a process: ranks share the machine's cores, and more threads would only wait for each other."""
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}


def answers(commands: Sequence[Sequence[str]], seconds: float) -> list[str]:
    """What commands that run side by side print. All are ended, with their children, when one fails or time is up.

    Raises Failed with what the first of them to fail complained of.
    """
    with ExitStack() as stack:
        texts = [[stack.enter_context(TemporaryFile("w+", errors="replace")) for _ in range(2)] for _ in commands]
        jobs = []
        for words, (out, complaint) in zip(commands, texts, strict=True):
            jobs.append(started(words, out, complaint))
            stack.callback(end, jobs[-1])
        deadline = time.monotonic() + seconds
        while any(job.poll() is None for job in jobs) and not any(job.poll() for job in jobs):
            if time.monotonic() > deadline:
                raise Failed(f"took longer than {seconds:g} s")
            time.sleep(0.05)
        for job, (_, complaint) in zip(jobs, texts, strict=True):
            if job.returncode:
                complaint.seek(0)
                raise Failed(cause_in(complaint.read()) or f"ended with exit code {job.returncode}")
        for out, _ in texts:
            out.seek(0)
        return [out.read() for out, _ in texts]


def started(words: Sequence[str], out: IO[str], complaint: IO[str]) -> subprocess.Popen[bytes]:
    """A process at the head of a session of its own; Failed if there is no such program."""
    try:
        return subprocess.Popen(
            list(words), cwd=ROOT, env=environment(), start_new_session=True,
            stdin=subprocess.DEVNULL, stdout=out, stderr=complaint,
        )  # fmt: skip
    except OSError as error:
        raise Failed(str(error)) from None


def end(job: subprocess.Popen[bytes]) -> None:
    """Kill a job's whole session, if anything of it is left."""
    with suppress(ProcessLookupError):
        os.killpg(job.pid, signal.SIGKILL)
    job.wait()


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
