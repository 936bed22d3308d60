"""Intervals over seeds agree with a calculation by hand and with scipy's own test of paired samples."""

import math

import pytest
from scipy.stats import ttest_rel

from research.study.rows import Row
from research.study.statistics import between_twins, over_seeds, t_interval


def rows_of(variant: str, values: dict[int, float]) -> list[Row]:
    return [
        Row(f"{variant}{seed}", "reward_model", "rmb", variant, seed, 1.0, {"x": value}, {}, {})
        for seed, value in values.items()
    ]


def x_of(row: Row) -> float | None:
    return row.figures.get("x")


def test_an_interval_of_three_values_is_the_one_worked_out_by_hand() -> None:
    interval = t_interval([1.0, 2.0, 3.0])  # mean 2, standard error 1 / sqrt 3, t of 2 degrees of freedom 4.302653
    half = 4.302653 / math.sqrt(3)
    assert (interval.mean, interval.low, interval.high) == pytest.approx((2, 2 - half, 2 + half), rel=1e-6)
    assert interval.sign == 0


def test_one_value_has_no_interval_and_no_side() -> None:
    interval = t_interval([0.7])
    assert math.isnan(interval.low)
    assert (interval.mean, interval.sign, interval.num_seeds) == (0.7, 0, 1)


def test_twins_are_compared_seed_by_seed_over_the_seeds_that_both_have() -> None:
    bsr, bt = {0: 0.61, 1: 0.72, 2: 0.55, 3: 0.90}, {0: 0.60, 1: 0.70, 2: 0.54, 9: 0.1}
    interval = between_twins(rows_of("bsr", bsr) + rows_of("bt", bt), "rmb", "bsr", "bt", x_of)
    assert interval is not None
    expected = ttest_rel([0.61, 0.72, 0.55], [0.60, 0.70, 0.54]).confidence_interval(0.95)
    assert (interval.low, interval.high, interval.num_seeds) == pytest.approx((expected.low, expected.high, 3))


def test_what_no_row_has_has_no_interval() -> None:
    rows = rows_of("bt", {0: 0.5})
    assert over_seeds(rows, "embedded", "bt", x_of) is None
    assert between_twins(rows, "rmb", "bsr", "bt", x_of) is None
    assert over_seeds(rows, "rmb", "bt", lambda row: row.figures.get("y")) is None
