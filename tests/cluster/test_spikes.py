"""Spikes: steps of ten standard deviations are found, noise and trends are not, and a resumed watch goes on."""

import json
import math
import random

import pytest

from cluster.spikes import LEAST, LIMIT, WINDOW, Spike, SpikeWatch


def noise(seed: int, count: int, middle: float = 4.0, sigma: float = 0.1) -> list[float]:
    draw = random.Random(seed)
    return [draw.gauss(middle, sigma) for _ in range(count)]


def spikes(watch: SpikeWatch, values: list[float]) -> dict[int, Spike]:
    found = {number: watch.judge(value) for number, value in enumerate(values)}
    return {number: spike for number, spike in found.items() if spike}


@pytest.mark.parametrize("middle", [4.0, 0.0, -2.0])
def test_a_step_of_ten_sigma_is_found_wherever_it_comes(middle: float) -> None:
    for seed in range(100):
        values = noise(seed, LEAST + 3 * seed, middle)
        watch = SpikeWatch()
        assert not spikes(watch, values)
        spike = watch.judge(middle + 1.0)
        assert spike and 6 < spike.score < 16 and spike.middle == pytest.approx(middle, abs=0.05)


def test_normal_noise_gives_not_one_spike_in_each_of_five_times_10_000_values() -> None:
    assert not any(spikes(SpikeWatch(), noise(seed, 10_000)) for seed in range(5))


def test_the_score_is_in_standard_deviations() -> None:
    """The scores of normal noise: with no limit each value above the median is told with its own."""
    found = spikes(SpikeWatch(limit=-math.inf), noise(0, 20_000))
    assert len(found) == 20_000 - LEAST
    share = sum(spike.score > 1 for spike in found.values()) / len(found)
    assert share == pytest.approx(0.159, abs=0.01)  # of a normal distribution beyond one; 0.0026 is one sigma of it


@pytest.mark.parametrize("slope", [1e-4, -1e-4, 0.01, -0.01, 1.0])
def test_a_straight_trend_is_none(slope: float) -> None:
    """Steep or not: the newest value is 1.35 of the window's own standard deviations ahead of its median."""
    for sigma in (0.0, 0.02):
        values = [100 + slope * number + one for number, one in enumerate(noise(1, 3000, 0.0, sigma))]
        assert not spikes(SpikeWatch(), values)


def test_the_fall_of_a_loss_from_its_start_is_none() -> None:
    values = [4.0 + 5.0 * math.exp(-number / 100) + one for number, one in enumerate(noise(2, 3000, 0.0, 0.03))]
    assert not spikes(SpikeWatch(), values)


def test_a_sudden_fall_is_none_but_a_rise_is() -> None:
    low, high = SpikeWatch(), SpikeWatch()
    for watch in (low, high):
        spikes(watch, noise(3, 200))
    assert low.judge(1.0) is None and high.judge(7.0) is not None


@pytest.mark.parametrize("level", [4.0, -4.0])
def test_a_flat_series_has_a_floor_under_its_noise(level: float) -> None:
    watch = SpikeWatch()
    assert not spikes(watch, [level] * 200 + [level + 0.02] * 20)  # five thousandths of it
    assert watch.judge(level + 0.03) is not None
    zero = SpikeWatch()
    assert not spikes(zero, [0.0] * 200) and zero.judge(1e-6) is not None


def test_nothing_is_judged_before_there_is_a_history() -> None:
    watch = SpikeWatch()
    assert not spikes(watch, noise(4, LEAST - 1)) and watch.judge(40.0) is None
    assert watch.judge(40.0) is not None


def test_what_is_not_finite_is_a_spike_at_once_and_is_not_remembered() -> None:
    watch = SpikeWatch()
    for value in (math.nan, math.inf, -math.inf):
        spike = watch.judge(value)
        assert spike and spike.score == math.inf
    assert watch.state() == {"values": []}
    assert "no number" in str(SpikeWatch().judge(math.nan))


def test_spikes_in_a_row_are_all_found_until_they_are_half_of_the_window() -> None:
    watch = SpikeWatch()
    spikes(watch, noise(5, WINDOW))
    found = spikes(watch, noise(6, WINDOW, middle=6.0))
    assert set(range(WINDOW // 2 - 16)) <= found.keys() and not found.keys() & set(range(WINDOW // 2 + 1, WINDOW))


def test_a_spike_tells_its_numbers() -> None:
    watch = SpikeWatch(limit=3.0, window=5)
    assert not spikes(watch, [1.0, 2.0, 3.0, 4.0, 5.0])
    spike = watch.judge(9.0)
    assert spike == Spike(9.0, 3.0, 1.4826, 6.0 / 1.4826)
    assert str(spike) == "9 is 4.0 standard deviations above the median 3"
    assert watch.state() == {"values": [2.0, 3.0, 4.0, 5.0, 9.0]}


@pytest.mark.parametrize("cut", [0, 10, LEAST, WINDOW, 500])
def test_a_resumed_watch_answers_as_an_undisturbed_one(cut: int) -> None:
    values = [value + (1.5 if number % 97 == 96 else 0) for number, value in enumerate(noise(7, 1000))]
    whole = spikes(SpikeWatch(), values)
    first, second = SpikeWatch(), SpikeWatch()
    found = spikes(first, values[:cut])
    second.restore(json.loads(json.dumps(first.state())))
    found |= {cut + number: spike for number, spike in spikes(second, values[cut:]).items()}
    assert found == whole and len(whole) == 10 and min(spike.score for spike in whole.values()) > LIMIT
