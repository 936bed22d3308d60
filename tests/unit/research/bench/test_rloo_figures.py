"""The RLOO bench's arithmetic, worked out by hand."""

import pytest

from research.bench.rloo_figures import ideal_step_s, phases_of, relative_difference, seconds_per_step
from research.bench.rloo_reward import reward_of


def test_steps_are_timed_from_end_to_end() -> None:
    # Steps of 2, 5 and 2 seconds after the one that ended at 10.
    assert seconds_per_step([10.0, 12.0, 17.0, 19.0]) == pytest.approx(3.0)


def test_the_ideal_step_is_the_longer_of_generation_and_all_the_rest() -> None:
    assert ideal_step_s(5.0, 2.0) == 3.0
    assert ideal_step_s(5.0, 4.0) == 4.0


def test_phases_are_the_time_metrics_of_every_step() -> None:
    lines: list[dict[str, str | int | float]] = [
        {"stage": "rloo", "step": 4, "time": 1.0, "time/generate_s": 0.5, "rloo/loss": 0.1},
        {"stage": "rloo", "step": 5, "time": 2.0, "time/generate_s": 0.7, "time/update_s": 0.2},
    ]
    assert phases_of(lines) == {"generate": [0.5, 0.7], "update": [0.2]}


def test_a_difference_is_relative_to_the_larger_value() -> None:
    assert relative_difference(20.0, 25.0) == relative_difference(25.0, 20.0) == pytest.approx(0.2)
    assert relative_difference(7.0, 7.0) == 0


def test_the_reward_is_best_at_twelve_words() -> None:
    assert reward_of("one two three four five six seven eight nine ten eleven twelve") == 0
    assert reward_of("one two") == reward_of(" ".join(["word"] * 22)) == pytest.approx(-1)
    assert reward_of("") == pytest.approx(-1.2)
