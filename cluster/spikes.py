"""Finds spikes in a series of numbers, such as a training loss or a gradient norm.

A value is held against the last ones by the modified z-score of Iglewicz and Hoaglin (1993): its
distance from their median, over 1.4826 times their median absolute deviation (MAD), which is the
standard deviation of normal noise. Earlier spikes in the window hardly move either of the two.
"""

import math
from collections import deque
from dataclasses import dataclass
from statistics import median
from typing import Any

WINDOW = 128  # values: few enough to follow the run, enough to know the noise to a tenth
LEAST = WINDOW // 2  # values before the first judgement; the estimate of the noise is then within a third
LIMIT = 6.0  # standard deviations. Normal noise gives far less than one in 10,000 values
SIGMA_OF_MAD = 1.4826  # standard deviation over MAD of normal noise; its inverse is 0.6745, the normal's upper quartile
FLOOR = 1e-3  # of the median, the least that counts as a standard deviation: a flat loss has no noise to measure


@dataclass(frozen=True)
class Spike:
    """A value that stands out, and what it stands out from."""

    value: float
    middle: float  # median of the values before it
    sigma: float  # their standard deviation, robustly estimated
    score: float  # (value - middle) / sigma; infinite if the value is not finite

    def __str__(self) -> str:
        if not math.isfinite(self.value):
            return f"{self.value} is no number; the median before it is {self.middle:.5g}"
        return f"{self.value:.5g} is {self.score:.1f} standard deviations above the median {self.middle:.5g}"


class SpikeWatch:
    """Watches one series. The answers depend on its values alone: the same on all ranks that see the same."""

    def __init__(self, limit: float = LIMIT, window: int = WINDOW) -> None:
        """limit: standard deviations above the median that make a spike; window: values that are looked back on."""
        self.limit, self.least = limit, min(LEAST, window)
        self._values: deque[float] = deque(maxlen=window)

    def judge(self, value: float) -> Spike | None:
        """The spike that the next value of the series is, or None.

        A value that is not finite is one at any time and is not remembered; a finite one is remembered even if it
        is a spike, so that a series which moved to a higher level for good is at rest again half a window later.
        A fall is none.
        """
        values = sorted(self._values)
        middle = median(values) if values else math.nan
        if not math.isfinite(value):
            return Spike(value, middle, math.nan, math.inf)
        self._values.append(value)
        if len(values) < self.least:
            return None
        spread = median(abs(one - middle) for one in values)
        sigma = max(SIGMA_OF_MAD * spread, FLOOR * abs(middle), math.ulp(1.0))
        score = (value - middle) / sigma
        return Spike(value, middle, sigma, score) if score > self.limit else None

    def state(self) -> dict[str, Any]:
        """What a resumed run needs; JSON keeps it to the last bit."""
        return {"values": list(self._values)}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a state; of a longer window only the last values are taken."""
        self._values = deque(state["values"], maxlen=self._values.maxlen)
