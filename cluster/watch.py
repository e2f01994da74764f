"""Reasons to end a run early: stop signals and a time limit, which all ranks read together at a step edge, and a hang.

A run that was told to stop saves and ends with exit code 130 after Ctrl-C, else with 75: "start me
again", for job scripts. A hung run cannot save: it shows where every thread stands and ends with 70.
"""

import faulthandler
import os
import signal
import sys
import threading
import time
from types import FrameType

from cluster.process import Place, largest_of

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
INTERRUPTED = 130  # exit code of Ctrl-C, as shells have it
REQUEUE = 75  # sysexits.h: EX_TEMPFAIL, try again
HUNG = 70  # sysexits.h: EX_SOFTWARE
MINUTE = 60.0


class Requeue(Exception):
    """A run ended early, saved, for another reason than Ctrl-C."""


class StopWatch:
    """Listens for Ctrl-C, SIGTERM and SIGUSR1 from `start` on, and to the clock; the same signal again stops at once.

    The same, because a launcher passes one Ctrl-C on as SIGINT from the terminal and SIGTERM from itself.
    """

    def __init__(self, place: Place, minutes: float = 0.0) -> None:
        """minutes: of run time, counted from here; 0 is no limit."""
        self.place = place
        self.signal: int | None = None
        self.until = time.monotonic() + minutes * MINUTE if minutes else float("inf")

    def start(self) -> None:
        for number in SIGNALS:
            signal.signal(number, self._note)

    def told_to_stop(self) -> int:
        """The exit code to end with, the same on all ranks once any has a reason; 0 to go on. Collective."""
        own = INTERRUPTED if self.signal == signal.SIGINT else REQUEUE
        is_over = self.signal is not None or time.monotonic() > self.until
        return largest_of(self.place, own if is_over else 0)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == self.signal:
            os._exit(128 + number)
        self.signal = self.signal or number


class HangWatch:
    """Ends the process when nothing was heard for too long: a lost peer, a dead file system, a deadlock."""

    def __init__(self, place: Place, minutes: float) -> None:
        """minutes: of silence that are too long; 0 watches nothing."""
        self.place, self.seconds = place, minutes * MINUTE
        self.doing = ""
        self._heard = time.monotonic()
        self._over = threading.Event()

    def start(self) -> None:
        self.beat("starting")
        if self.seconds:
            threading.Thread(target=self._watch, name="hang watch", daemon=True).start()

    def beat(self, doing: str) -> None:
        """All is well; what comes next."""
        self.doing, self._heard = doing, time.monotonic()

    def close(self) -> None:
        self._over.set()

    def _watch(self) -> None:
        while not self._over.wait(min(1.0, self.seconds / 4)):
            silent = time.monotonic() - self._heard
            if silent > self.seconds:
                told = f"rank {self.place.rank} hangs: {self.doing} has taken {silent / MINUTE:.1f} minutes"
                limit = f"hang_minutes={self.seconds / MINUTE:g}"
                print(f"\nsmalti: {told} ({limit}); saves are untouched. All stacks:", file=sys.stderr, flush=True)
                faulthandler.dump_traceback(sys.stderr, all_threads=True)
                os._exit(HUNG)
