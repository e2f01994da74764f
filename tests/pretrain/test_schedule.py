"""Step sizes: the cosine to the last digit, and halvings at plateaus that a resumed run repeats bit for bit."""

import json
import math
import random
from collections.abc import Iterable
from dataclasses import replace

import pytest

from pretrain.config import OptimConfig
from pretrain.schedule import Schedule

PLATEAU = OptimConfig(
    lr=4.5e-4,
    warmup_steps=4,
    schedule="plateau",
    plateau_window=10,
    plateau_patience=3,
    plateau_threshold=0.01,
)
PATIENCE = 30  # updates that may pass without a better window there


def follow(schedule: Schedule, losses: Iterable[float], first: int = 0) -> list[float]:
    """The step sizes of the updates that gave these losses."""
    rates = []
    for step, loss in enumerate(losses, first):
        rates.append(schedule.rate(step))
        schedule.learn(step, loss)
    return rates


def windows(*means: float) -> list[float]:
    """Losses of the warm-up and then of windows with these means, of which no single loss is the mean."""
    return [9.0] * PLATEAU.warmup_steps + [mean + shift for mean in means for shift in (-0.5, 0.5) * 5]


def halvings(rates: list[float]) -> list[int]:
    return [step for step in range(PLATEAU.warmup_steps + 1, len(rates)) if rates[step] == rates[step - 1] / 2]


@pytest.mark.parametrize(
    ("step", "rate"),
    [
        (0, "0x1.2dfd694ccab3fp-18"),
        (42, "0x1.95cc857f3061cp-13"),
        (99, "0x1.d7dbf487fcb92p-12"),
        (100, "0x1.d7dbf487fcb92p-12"),
        (101, "0x1.d7db9fc08506ep-12"),
        (550, "0x1.0385c67dfe32ap-12"),
        (999, "0x1.797f69dbbaf2ep-15"),
    ],
)
def test_the_cosine_keeps_its_digits(step: int, rate: str) -> None:
    """Recorded when it was the only schedule: finished runs must be repeatable."""
    assert Schedule(OptimConfig(lr=4.5e-4, warmup_steps=100, final_lr=0.1), 1000).rate(step).hex() == rate


def test_a_constant_follows_the_ramp() -> None:
    schedule = Schedule(OptimConfig(lr=1.0, warmup_steps=4, schedule="constant"), 100)
    assert follow(schedule, [5.0] * 100) == [0.25, 0.5, 0.75] + [1.0] * 97


def test_a_run_without_a_ramp_starts_at_the_peak() -> None:
    assert {Schedule(replace(PLATEAU, warmup_steps=0, schedule=one), 9).rate(0) for one in ("cosine", "plateau")} == {
        4.5e-4
    }


def test_a_flat_loss_halves_five_times_and_ends_at_a_32nd() -> None:
    rates = follow(Schedule(PLATEAU, 1000), windows(*[4.0] * 40))
    first = PLATEAU.warmup_steps + PLATEAU.plateau_window + PATIENCE  # the first window is better than none
    assert halvings(rates) == [first + number * PATIENCE for number in range(5)]
    assert rates[-1] == 4.5e-4 / 32


def test_a_fall_that_adds_up_to_the_threshold_within_the_patience_is_no_plateau() -> None:
    """0.4 % a window are 1.2 % in three, 0.3 % are not."""
    enough, too_little = ([4.0 * (1 - share) ** number for number in range(40)] for share in (0.004, 0.003))
    assert halvings(follow(Schedule(PLATEAU, 1000), windows(*enough))) == []
    assert halvings(follow(Schedule(PLATEAU, 1000), windows(*too_little))) != []


def test_better_is_measured_from_the_last_better_window_and_after_a_halving_still() -> None:
    means = [4.0, 5.0, 3.99, 3.98, 3.97, 3.97, 3.95, 3.94, 3.94, 3.94]  # better than 4.0 is below 3.96
    rates = follow(Schedule(PLATEAU, 1000), [*windows(*means), 3.94])
    assert halvings(rates) == [4 + 40, 4 + 100]


def test_a_negative_loss_has_plateaus_too() -> None:
    falling = [-1.0 - 0.02 * number for number in range(20)]
    assert halvings(follow(Schedule(PLATEAU, 1000), windows(*falling))) == []
    assert len(halvings(follow(Schedule(PLATEAU, 1000), windows(*[-1.0] * 20)))) == 5


def test_the_ramp_and_what_is_not_finite_are_not_learnt_from() -> None:
    clean = Schedule(PLATEAU, 1000)
    follow(clean, windows(4.0, 3.0))
    other = Schedule(PLATEAU, 1000)
    losses = windows(4.0, 3.0)
    ramp = PLATEAU.warmup_steps
    follow(other, [0.001] * ramp + [math.nan, math.inf] + losses[ramp:])
    assert other.state() == clean.state() and clean.state()["best"] == 3.0


def test_other_schedules_learn_nothing() -> None:
    schedule = Schedule(replace(PLATEAU, schedule="cosine"), 1000)
    fresh = schedule.state()
    follow(schedule, windows(4.0, 4.0))
    assert schedule.state() == fresh


@pytest.mark.parametrize("cut", [2, 4, 13, 14, 15, 43, 44, 45, 150])
def test_a_resumed_run_has_the_same_step_sizes(cut: int) -> None:
    """Cut in the ramp, in a window, at its edge, at a halving; the state goes through JSON as in a checkpoint."""
    draw = random.Random(0)
    losses = [4.0 + draw.gauss(0, 0.1) for _ in range(300)]
    whole = Schedule(PLATEAU, 300)
    want = follow(whole, losses)
    assert len(halvings(want)) == 5
    first, second = Schedule(PLATEAU, 300), Schedule(PLATEAU, 300)
    got = follow(first, losses[:cut])
    second.restore(json.loads(json.dumps(first.state())))
    got += follow(second, losses[cut:], cut)
    assert got == want and second.state() == whole.state()


def test_what_is_no_state_is_refused() -> None:
    with pytest.raises(TypeError):
        Schedule(PLATEAU, 300).restore({"halved": 1, "tired": 2})


@pytest.mark.parametrize("exponent", [0.15, 0.3])
def test_the_defaults_make_the_papers_five_halvings_within_its_updates(exponent: float) -> None:
    """A loss that falls as a power law of the updates done at the peak, with 0.01 nats of noise between batches."""
    draw = random.Random(0)
    config = OptimConfig(lr=4.5e-4, warmup_steps=5000, schedule="plateau")
    schedule, done = Schedule(config, 430_000), 5000.0
    for step in range(5000, 430_000):
        done += schedule.rate(step) / config.lr
        schedule.learn(step, 3.5 + 4.0 * (done / 5000) ** -exponent + draw.gauss(0, 0.01))
        if step == 200_000:
            assert schedule.rate(step) == config.lr  # still falling by more than 0.2 % in 10,000 updates
    assert schedule.rate(429_999) == pytest.approx(1.41e-5, rel=0.01)  # the paper's last step size
