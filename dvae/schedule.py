"""The three cosine schedules of the discrete VAE as pure functions of the step (appendix A.2)."""

import math

from dvae.config import ScheduleConfig


def cosine(first: float, last: float, step: int, n_steps: int) -> float:
    """From `first` at step 0 to `last` at `n_steps`, and constant after."""
    share = min(step / n_steps, 1.0) if n_steps > 0 else 1.0
    return last + (first - last) * (1 + math.cos(math.pi * share)) / 2


def learning_rate(config: ScheduleConfig, step: int) -> float:
    return cosine(config.lr, config.final_lr, step, config.lr_steps)


def temperature(config: ScheduleConfig, step: int) -> float:
    """tau of the relaxation."""
    return cosine(config.temperature, config.final_temperature, step, config.temperature_steps)


def kl_weight(config: ScheduleConfig, step: int) -> float:
    """beta, the weight of the KL term."""
    return cosine(0.0, config.kl_weight, step, config.kl_steps)
