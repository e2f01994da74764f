"""The step size at each update: a linear warm-up, then a cosine, a constant, or halvings at plateaus of the loss.

The paper halves its step size five times, each time the training loss plateaus (Ramesh et al. 2021,
appendix B.2), and states no rule for "plateaus". Ours is written here, so that nobody has to watch.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any

from pretrain.config import AdamConfig, OptimConfig


@dataclass
class Plateau:
    """What the plateau rule remembers between updates."""

    halved: int = 0  # times the step size was halved
    best: float | None = None  # mean loss of the last window that counted as better
    stale: int = 0  # windows since it, or since the last halving
    count: int = 0  # losses in the open window
    total: float = 0.0  # their sum


class Schedule:
    """Step sizes of a run of n_steps updates; `learn` needs calling only for what `plateau` knows.

    The plateau rule: the training losses after the warm-up are averaged over windows of `plateau_window`
    updates. A window is better if its mean is below that of the last better one by more than the share
    `plateau_threshold`. After `plateau_patience` windows in a row that are not, the step size is halved and the
    count begins anew, `halvings` times at most. So a slow fall counts as long as it adds up in time: with the
    defaults, 10,000 updates that bring less than 0.2 % are a plateau. Equal losses give equal step sizes: fed with
    the mean over ranks, all ranks halve at the same update.
    """

    def __init__(self, config: OptimConfig, n_steps: int) -> None:
        self.config, self.n_steps = config, n_steps
        self.plateau = Plateau()

    def rate(self, step: int) -> float:
        """The step size of update `step` (from 0), after all earlier ones were learnt from."""
        config = self.config
        if step < config.warmup_steps:
            return cosine(config, step, self.n_steps)
        if config.schedule == "constant":
            return config.lr
        if config.schedule == "plateau":
            return config.lr * 0.5**self.plateau.halved
        return cosine(config, step, self.n_steps)

    def learn(self, step: int, loss: float) -> None:
        """Take the training loss of update `step` into account; one that is not finite is passed over."""
        config, plateau = self.config, self.plateau
        if config.schedule != "plateau" or step < config.warmup_steps or not math.isfinite(loss):
            return
        plateau.count += 1
        plateau.total += loss
        if plateau.count < config.plateau_window:
            return
        mean = plateau.total / plateau.count
        plateau.count, plateau.total = 0, 0.0
        if plateau.best is None or mean < plateau.best - config.plateau_threshold * abs(plateau.best):
            plateau.best, plateau.stale = mean, 0
            return
        plateau.stale += 1
        if plateau.stale >= config.plateau_patience and plateau.halved < config.halvings:
            plateau.halved, plateau.stale = plateau.halved + 1, 0

    def state(self) -> dict[str, Any]:
        """What a resumed run needs; JSON keeps it to the last bit."""
        return asdict(self.plateau)

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a state; TypeError if it is none."""
        self.plateau = Plateau(**state)


def cosine(config: AdamConfig, step: int, n_steps: int) -> float:
    """Linear warm-up to the peak, then a cosine to final_lr of it at the last step."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    share = (step - config.warmup_steps) / max(1, n_steps - config.warmup_steps)
    return config.lr * (config.final_lr + (1 - config.final_lr) * (1 + math.cos(math.pi * share)) / 2)
