"""The over-optimisation monitor: when it fires, how often noise makes it fire, and that a resumed run agrees."""

import json
import logging
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from rm_robust.config.rloo import MonitorConfig
from rm_robust.rloo.monitor import OveroptimisationMonitor, rise_with_error

WINDOW = MonitorConfig().window_steps


def observe(
    monitor: OveroptimisationMonitor, proxy: Sequence[float], gold: Sequence[float | None], *, first_step: int = 1
) -> list[dict[str, float]]:
    """Return the metrics of every step; the scores of a step have standard deviation 2 (proxy) and 0.5 (gold)."""
    return [
        monitor.observe(
            step,
            proxy_mean=proxy_mean,
            proxy_std=2.0,
            gold_mean=gold_mean,
            gold_std=None if gold_mean is None else 0.5,
        )
        for step, (proxy_mean, gold_mean) in enumerate(zip(proxy, gold, strict=True), first_step)
    ]


def noisy(
    seed: int, *, num_steps: int, num_completions: int, proxy_slope: float = 0.0, gold_slope: float = 0.0
) -> tuple[list[float], list[float]]:
    """Return the mean scores of each step. The unit of a slope is the standard deviation of one score, per step."""
    rng = np.random.default_rng(seed)
    noise_2S = rng.normal(size=(2, num_steps)) / math.sqrt(num_completions)
    trend_2S = np.outer([proxy_slope, gold_slope], np.arange(num_steps))
    proxy, gold = (noise_2S + trend_2S) * [[2.0], [0.5]]
    return proxy.tolist(), gold.tolist()


def test_rise_and_error_by_hand() -> None:
    """The differences 1, 1, 3, 1, 1 have mean 1.4 and variance 3.2 / 5 = 0.64; a step has half, 0.32; halves have 3."""
    rise, error = rise_with_error([1, 2, 3, 6, 7, 8])
    assert rise == 5
    assert error == pytest.approx(math.sqrt(2 * 0.32 / 3))


def test_a_steady_trend_has_no_error_and_the_middle_of_an_odd_window_is_in_neither_half() -> None:
    assert rise_with_error([0.0, 1.0, 2.0, 3.0]) == (2.0, 0.0)
    assert rise_with_error([0.0, 9.0, 1.0])[0] == 1.0


def test_the_error_is_the_spread_of_the_rise_of_pure_noise() -> None:
    rises, errors = zip(
        *(rise_with_error(row) for row in np.random.default_rng(0).normal(size=(2000, WINDOW)).tolist()), strict=True
    )
    assert np.sqrt(np.mean(np.square(errors))) == pytest.approx(np.std(rises), rel=0.05)


def test_rises_are_in_standard_deviations_of_the_first_step() -> None:
    """In a window of 4, the proxy 0 0 3 3 rises by 3 in units of 2, and gold 0 0 1 1 by 1 in units of 0.5.

    The deviations of later steps do not matter.
    """
    monitor = OveroptimisationMonitor(MonitorConfig(window_steps=4))
    observe(monitor, [0, 0, 3], [0, 0, 1])
    metrics = monitor.observe(4, proxy_mean=3, proxy_std=99.0, gold_mean=1, gold_std=99.0)
    assert metrics["rloo/monitor/proxy_rise"] == 1.5
    assert metrics["rloo/monitor/gold_rise"] == 2.0


def test_there_are_no_metrics_before_the_window_is_full() -> None:
    metrics = observe(OveroptimisationMonitor(MonitorConfig(window_steps=4)), range(5), [0] * 5)
    assert metrics[:3] == [{}, {}, {}]
    assert [step_metrics["rloo/overoptimised"] for step_metrics in metrics[3:]] == [1, 1]


def test_a_first_step_whose_scores_are_all_equal_gives_no_unit_and_the_next_does() -> None:
    monitor = OveroptimisationMonitor(MonitorConfig(window_steps=4))
    monitor.observe(1, proxy_mean=0, proxy_std=0.0, gold_mean=0, gold_std=0.0)
    assert observe(monitor, [0, 4, 4], [0, 0, 0], first_step=2)[-1]["rloo/monitor/proxy_rise"] == 2.0


@pytest.mark.parametrize("gold", [0.0, -0.02])
def test_a_rising_proxy_with_flat_or_falling_gold_fires(gold: float) -> None:
    monitor = OveroptimisationMonitor(MonitorConfig())
    observe(monitor, [0.1 * step for step in range(WINDOW)], [gold * step for step in range(WINDOW)])
    assert monitor.is_overoptimised
    assert monitor.num_firings == 1


def test_a_proxy_that_rises_with_gold_does_not_fire_nor_does_one_that_falls_or_hardly_rises() -> None:
    # the last slope, 0.04, is a rise of 0.4, which is 0.2 deviations
    for proxy_slope, gold_slope in ((0.1, 0.01), (-0.1, -0.01), (0.04, 0.0)):
        monitor = OveroptimisationMonitor(MonitorConfig())
        observe(monitor, [proxy_slope * step for step in range(60)], [gold_slope * step for step in range(60)])
        assert monitor.num_firings == 0


def test_a_gold_score_that_falls_fires_however_little_the_proxy_rises_but_not_when_it_falls_too() -> None:
    # gold falls by 0.2, 0.04 and 0.2 deviations
    for proxy_step, gold_step, num_firings in ((0.001, -0.01, 1), (0.001, -0.002, 0), (-0.001, -0.01, 0)):
        monitor = OveroptimisationMonitor(MonitorConfig())
        observe(monitor, [proxy_step * step for step in range(WINDOW)], [gold_step * step for step in range(WINDOW)])
        assert monitor.num_firings == num_firings


def test_a_fall_of_gold_by_chance_does_not_fire() -> None:
    # its standard error is a quarter deviation, so a fall of 0.97 would be needed
    zigzag = [0.2 if step % 2 else -0.2 for step in range(WINDOW)]
    fired = []
    for fall in (0.8, 1.5):
        monitor = OveroptimisationMonitor(MonitorConfig())
        observe(
            monitor,
            [0.001 * step for step in range(WINDOW)],
            [noise - fall * (step >= WINDOW // 2) * 0.5 for step, noise in enumerate(zigzag)],
        )
        fired.append(monitor.num_firings)
    assert fired == [0, 1]


def test_the_monitor_fires_when_gold_rises_by_max_gold_rise_at_most() -> None:
    """Gold rises by 10 * 0.01 / 0.5 = 0.2 deviations over a window of 20."""
    for max_gold_rise, num_firings in ((0.19, 0), (0.21, 1)):
        monitor = OveroptimisationMonitor(MonitorConfig(max_gold_rise=max_gold_rise))
        observe(monitor, [0.1 * step for step in range(20)], [0.01 * step for step in range(20)])
        assert monitor.num_firings == num_firings


def firing_fraction(
    num_runs: int, *, num_steps: int, num_completions: int, proxy_slope: float = 0.0, gold_slope: float = 0.0
) -> float:
    """Return the fraction of simulated runs with the default settings that fire at any step."""
    monitors = []
    for seed in range(num_runs):
        monitors.append(OveroptimisationMonitor(MonitorConfig()))
        observe(
            monitors[-1],
            *noisy(
                seed,
                num_steps=num_steps,
                num_completions=num_completions,
                proxy_slope=proxy_slope,
                gold_slope=gold_slope,
            ),
        )
    return sum(monitor.num_firings > 0 for monitor in monitors) / num_runs


@pytest.mark.parametrize(("num_completions", "most"), [(8, 0.03), (32, 0.02), (128, 0.004)])
def test_noise_of_a_flat_run_hardly_ever_fires(num_completions: int, most: float) -> None:
    """Over 3,000 seeds the fractions are 1.8 %, 1.0 % and 0.03 %."""
    assert firing_fraction(300, num_steps=60, num_completions=num_completions) <= most


def test_noise_does_not_hide_over_optimisation_nor_invent_it_in_a_healthy_run() -> None:
    assert firing_fraction(200, num_steps=60, num_completions=128, proxy_slope=0.04) >= 0.9
    assert firing_fraction(200, num_steps=60, num_completions=128, proxy_slope=0.04, gold_slope=-0.01) == 1.0
    assert firing_fraction(200, num_steps=60, num_completions=128, proxy_slope=0.04, gold_slope=0.02) == 0.0
    assert firing_fraction(200, num_steps=60, num_completions=128, proxy_slope=0.004, gold_slope=-0.02) == 1.0


def test_steps_without_gold_scores_do_not_count() -> None:
    proxy, gold = noisy(1, num_steps=40, num_completions=128, proxy_slope=0.05)
    sparse_proxy = [proxy[i // 3] if i % 3 == 0 else 1e6 for i in range(120)]
    sparse_gold = [gold[i // 3] if i % 3 == 0 else None for i in range(120)]
    sparse, dense = (OveroptimisationMonitor(MonitorConfig()) for _ in range(2))
    metrics = observe(sparse, sparse_proxy, sparse_gold)
    assert metrics[::3] == observe(dense, proxy, gold)
    assert not any(metrics[1::3] + metrics[2::3])
    assert sparse.num_firings == dense.num_firings > 0


def test_an_episode_is_one_warning_with_the_numbers(caplog: pytest.LogCaptureFixture) -> None:
    monitor = OveroptimisationMonitor(MonitorConfig())
    with caplog.at_level(logging.WARNING):
        observe(monitor, [0.1 * step for step in range(WINDOW + 5)], [-0.01 * step for step in range(WINDOW + 5)])
    (record,) = caplog.records
    message = record.getMessage()
    for expected in (
        "RLOO step 20: OVER-OPTIMISATION",
        "20 scored steps 1 to 20",
        "proxy score rose by 0.50 (standard error 0.00)",
        "gold score by -0.20 (0.00)",
        "warn",
    ):
        assert expected in message


def test_a_run_that_goes_on_over_optimising_fires_again_after_a_whole_window() -> None:
    monitor = OveroptimisationMonitor(MonitorConfig(action="lower_learning_rate", learning_rate_factor=0.5))
    factors = []
    for step in range(1, 3 * WINDOW + 1):
        observe(monitor, [0.1 * step], [0.0], first_step=step)
        factors.append(monitor.learning_rate_factor)
    assert factors == [1.0] * (WINDOW - 1) + [0.5] * WINDOW + [0.25] * WINDOW + [0.125]


def test_a_rule_that_holds_on_and_off_fires_once() -> None:
    monitor = OveroptimisationMonitor(MonitorConfig())
    gold = [0.0] * WINDOW + [20.0 if step % 2 else -20.0 for step in range(WINDOW - 1)]
    flags = [
        step_metrics["rloo/overoptimised"]
        for step_metrics in observe(monitor, [0.1 * step for step in range(len(gold))], gold)[WINDOW - 1 :]
    ]
    assert sum(before < after for before, after in zip(flags, flags[1:], strict=False)) > 1
    assert monitor.num_firings == 1


def test_the_action_decides_what_a_firing_does() -> None:
    monitors = {
        action: OveroptimisationMonitor(MonitorConfig(action=action))
        for action in ("warn", "lower_learning_rate", "stop")
    }
    for monitor in monitors.values():
        assert (monitor.must_stop, monitor.learning_rate_factor) == (False, 1.0)
        observe(monitor, [0.1 * step for step in range(WINDOW)], [0.0] * WINDOW)
    assert {action: (monitor.must_stop, monitor.learning_rate_factor) for action, monitor in monitors.items()} == {
        "warn": (False, 1.0),
        "lower_learning_rate": (False, 0.5),
        "stop": (True, 1.0),
    }


@pytest.mark.parametrize("num_committed", [0, 1, 20, 27, 45, 60])
@pytest.mark.parametrize("gold_every_steps", [1, 2])
def test_a_resumed_monitor_is_the_uninterrupted_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, num_committed: int, gold_every_steps: int
) -> None:
    """The file holds steps beyond the committed ones, as a killed run leaves it."""
    settings = MonitorConfig(window_steps=10, action="lower_learning_rate")
    proxy, dense_gold = noisy(3, num_steps=80, num_completions=128, proxy_slope=0.06)
    gold = [value if step % gold_every_steps == 0 else None for step, value in enumerate(dense_gold)]
    uninterrupted = OveroptimisationMonitor(settings)
    metrics = observe(uninterrupted, proxy, gold)
    with (tmp_path / "metrics.jsonl").open("w") as file:
        for step, (proxy_mean, gold_mean, step_metrics) in enumerate(zip(proxy[:70], gold, metrics, strict=False), 1):
            scores = {"rloo/proxy_score_mean": proxy_mean, "rloo/proxy_score_std": 2.0}
            scores |= {} if gold_mean is None else {"rloo/gold_score_mean": gold_mean, "rloo/gold_score_std": 0.5}
            file.write(json.dumps({"stage": "rloo", "step": step, "time": 0.0} | scores | step_metrics) + "\n")
    caplog.clear()
    resumed = OveroptimisationMonitor(settings)
    resumed.resume(tmp_path, num_committed)
    assert not caplog.records
    assert (
        observe(resumed, proxy[num_committed:], gold[num_committed:], first_step=num_committed + 1)
        == metrics[num_committed:]
    )
    assert vars(resumed) == vars(uninterrupted)
    assert resumed.num_firings > 0
