"""Stop signals turned into a flag that all ranks read together at a step edge."""

import os
import signal
from types import FrameType

from cluster.process import Place, all_agree

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class StopWatch:
    """Listens for Ctrl-C, SIGTERM and SIGUSR1 from `start` on; the same signal again stops at once.

    The same, because a launcher passes one Ctrl-C on as SIGINT from the terminal and SIGTERM from itself.
    """

    def __init__(self, place: Place) -> None:
        self.place = place
        self.signal: int | None = None

    def start(self) -> None:
        for number in SIGNALS:
            signal.signal(number, self._note)

    def told_to_stop(self) -> bool:
        """True on all ranks once any rank was signalled. Collective: every rank must ask."""
        return all_agree(self.place, self.signal is not None)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == self.signal:
            os._exit(128 + number)
        self.signal = self.signal or number
