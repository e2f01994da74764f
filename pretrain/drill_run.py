"""A run of `smalti train` as the drill sees it: starts of the command, one after the other, and what they came to."""

import json
import math
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors.torch import load_file

from cluster.checkpoint import found_in, verify
from cluster.ledger import NAME as LEDGER
from cluster.metrics import read_metrics
from cluster.weights import WEIGHTS
from pretrain.drill_worker import Accident

LEG_SECONDS = 480.0  # that a start may take in all; on two free cores it takes 5
POLL_SECONDS = 0.003  # a small part of a step, so that a moment can be met
BEGUN = re.compile(r"^transformer: \d+/\d+ steps", re.M)  # said after the first step of each start
RESUMED = re.compile(r"^transformer: resumed at step (\d+) of", re.M)
# Between layouts the same float32 numbers are summed in another order. Measured over a run: 1.5e-7 of a loss, 4e-7 in a
# weight. With the moments or the average not restored it is 1e-2 and 5e-3.
TOLERANCE = 1e-5


class Missed(Exception):
    """The run was over before the fault could happen: it is tried again on another run."""


class NotSurvived(Exception):
    """What a run did that it should not have done."""


@dataclass(frozen=True)
class Layout:
    """How a run is spread."""

    processes: int = 1
    zero_stage: int = 1

    def __str__(self) -> str:
        return f"{self.processes} x stage {self.zero_stage}"


@dataclass(frozen=True)
class Cut:
    """What was cut off a shard: it has so many bytes when the batch of this step is read."""

    file: str
    n_bytes: int
    step: int


@dataclass
class Strike:
    """A fault that happened, and what the run made of it."""

    fault: str
    number: int  # of the fault in the drill
    step: int = -1  # the last one that was logged
    how: str = ""
    exit: int | None = None  # code of the process, or of its launcher; negative: the signal
    recovered: bool = False
    resumed_at: int | None = None
    steps_lost: int | None = None  # that the newest sealed checkpoint had, and were done again
    problem: str = ""

    def line(self) -> dict[str, Any]:
        """As it is printed; what is not known is left out."""
        always = {"recovered": self.recovered and not self.problem, "steps_lost": self.steps_lost}
        return {key: value for key, value in asdict(self).items() if value not in ("", None)} | always


@dataclass(frozen=True)
class Equal:
    """How a run that has ended compares with an undisturbed one."""

    weights_equal: bool = False
    losses_equal: bool = False
    ledger_equal: bool = False


class Leg:
    """One start of the command: a process, or a launcher and its ranks."""

    def __init__(self, words: list[str], processes: int, accidents: Sequence[Accident], log: Path) -> None:
        program = ["pretrain.drill_worker", json.dumps(accidents)] if accidents else ["pretrain.train"]
        if not accidents and processes == 1:
            program = ["pretrain.cli", "train"]
        launcher = ["-m", "torch.distributed.run", f"--nproc-per-node={processes}", "--standalone"]
        command = [sys.executable, "-u", *(launcher if processes > 1 else []), "-m", *program, *words]
        self.log, self.processes = log, processes
        self.ranks: list[psutil.Process] = []
        self.until_when = time.monotonic() + LEG_SECONDS
        with open(log, "wb") as file:
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
            )

    def said(self) -> str:
        return self.log.read_text(errors="replace")

    def until(self, condition: Callable[[], bool], what: str) -> None:
        """Wait for it. Missed if the run is finished before; NotSurvived if it ended in another way, or hangs."""
        while not condition():
            code = self.process.poll()
            if code is not None and not condition():
                if code == 0:
                    raise Missed
                raise NotSurvived(f"ended with {code} before {what}: {self.last_words()}")
            if time.monotonic() > self.until_when:
                self.kill()
                raise NotSurvived(f"no {what} in {LEG_SECONDS:.0f} s: {self.last_words()}")
            time.sleep(POLL_SECONDS)

    def wait(self, seconds: float = LEG_SECONDS) -> int:
        """Its exit code. NotSurvived after so many seconds."""
        try:
            return self.process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            self.kill()
            raise NotSurvived(f"did not end in {seconds:.0f} s: {self.last_words()}") from None

    def look_for_ranks(self) -> None:
        """Fill `ranks`, once they have all been started."""
        me = psutil.Process(self.process.pid)
        self.ranks = sorted(me.children(), key=lambda child: child.pid) if self.processes > 1 else [me]

    def has_lost_a_rank(self) -> bool:
        return len(self.ranks) < self.processes or any(not is_alive(rank) for rank in self.ranks)

    def left_behind(self) -> list[psutil.Process]:
        """Ranks that still live some moments after the launcher has ended."""
        psutil.wait_procs(self.ranks, timeout=1.0)
        return [rank for rank in self.ranks if is_alive(rank)]

    def kill(self) -> None:
        """SIGKILL to all of it; the launcher is stopped first, so that it neither starts nor ends others."""
        family = set(self.ranks)
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGSTOP)
            family |= set(psutil.Process(self.process.pid).children(recursive=True))
            self.process.kill()
            self.process.wait()
        for process in family:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(family, timeout=LEG_SECONDS)

    def last_words(self) -> str:
        lines = [line for line in self.said().splitlines() if line.strip()]
        return lines[-1] if lines else "it said nothing"


def is_alive(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


class DrilledRun:
    """A run folder and the starts of the command that fill it."""

    def __init__(
        self, folder: Path, words: list[str], tokens: Path, layout: Layout, accidents: Sequence[Accident] = ()
    ) -> None:
        """In a folder that is there. words: all but of `tokens`, `out` and `zero_stage`; accidents: what befalls every
        start of it."""
        self.folder, self.out, self.tokens = folder, folder / "run", tokens
        self.words, self.layout, self.accidents = words, layout, list(accidents)
        self.was_cut: Cut | None = None
        self.strikes: list[Strike] = []
        self.legs: list[Leg] = []
        self.must_say = ""  # by the next start
        self._sealed = 0  # when the last start was made
        self._waiting: list[Strike] = []  # for the next start to show what they cost

    def start(self, words: Sequence[str] = (), accidents: Sequence[Accident] = ()) -> Leg:
        """The same command again; with more words or accidents, for this once."""
        self._sealed = self.sealed()
        layout = self.layout
        words = [*self.words, f"tokens={self.tokens}", f"out={self.out}", f"zero_stage={layout.zero_stage}", *words]
        log = self.folder / f"start{len(self.legs)}.log"
        self.legs.append(Leg(words, layout.processes, [*self.accidents, *accidents], log))
        return self.legs[-1]

    def reach(self, leg: Leg, step: int) -> None:
        """Wait until a start has logged this step."""
        leg.until(lambda: bool(BEGUN.search(leg.said())), "its first step")
        self._learn(leg)
        leg.look_for_ranks()
        leg.until(lambda: self.logged() >= step, f"step {step}")

    def wait(self, leg: Leg, seconds: float = LEG_SECONDS) -> int:
        """The exit code of a start that comes to its end."""
        code = leg.wait(seconds)
        self._learn(leg)
        return code

    def finish(self) -> None:
        """One more start, to the end. NotSurvived if it does not get there."""
        leg = self.start()
        code = self.wait(leg)
        if code:
            raise NotSurvived(f"ended with {code}: {leg.last_words()}")

    def struck(self, strike: Strike) -> None:
        """A fault has happened, and the run has ended for it: the next start shows what it cost."""
        self.strikes.append(strike)
        self._waiting.append(strike)

    def logged(self) -> int:
        """The last step in the run's metrics, -1 if there is none."""
        return max((record["step"] for record in read_metrics(self.out)), default=-1)

    def sealed(self) -> int:
        """The step of the newest checkpoint that verifies, 0 if there is none."""
        found = found_in(self.out / "checkpoints")
        return next((step for step, folder in reversed(found) if verify(folder) is None), 0)

    def close(self) -> None:
        """Leave no process behind."""
        for leg in self.legs:
            leg.kill()

    def _learn(self, leg: Leg) -> None:
        """What the faults before this start have cost."""
        said = leg.said()
        resumed = RESUMED.search(said)
        if not resumed and not BEGUN.search(said):
            return
        step = int(resumed[1]) if resumed else 0
        for strike in self._waiting:
            strike.recovered, strike.resumed_at, strike.steps_lost = True, step, self._sealed - step
            if self.must_say not in said:
                strike.problem = f"the next start did not say {self.must_say!r}"
        self._waiting, self.must_say = [], ""


def compare(run: Path, undisturbed: Path, tolerance: float = 0.0) -> Equal:
    """Final weights, logged numbers and ledger of two runs; given a tolerance, weights and losses need only be near."""
    return Equal(
        _same_weights(run / WEIGHTS, undisturbed / WEIGHTS, tolerance),
        _same_numbers(_numbers(run), _numbers(undisturbed), tolerance),
        _same_bytes(run / LEDGER, undisturbed / LEDGER),
    )


def _same_weights(run: Path, undisturbed: Path, tolerance: float) -> bool:
    if not tolerance or not run.is_file():
        return _same_bytes(run, undisturbed)
    ours, theirs = load_file(run), load_file(undisturbed)
    return ours.keys() == theirs.keys() and all(
        torch.allclose(ours[name], theirs[name], rtol=tolerance, atol=tolerance) for name in ours
    )


def _numbers(run: Path) -> list[tuple[int, str, float]]:
    """(step, tag, value) of all that a run logged, but for times."""
    records = read_metrics(run)
    return [
        (record["step"], tag, value)
        for record in records
        for tag, value in record.items()
        if tag != "step" and not tag.startswith("perf/")
    ]


def _same_numbers(ours: list[Any], theirs: list[Any], tolerance: float) -> bool:
    if not tolerance:
        return bool(ours) and repr(ours) == repr(theirs)  # a NaN is itself
    pairs = list(zip(ours, theirs, strict=False))
    return len(ours) == len(theirs) > 0 and all(
        our[:2] == their[:2] and ("loss" not in our[1] or math.isclose(our[2], their[2], rel_tol=tolerance))
        for our, their in pairs
    )


def _same_bytes(ours: Path, theirs: Path) -> bool:
    return ours.is_file() and theirs.is_file() and ours.read_bytes() == theirs.read_bytes()
