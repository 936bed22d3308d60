import math

import numpy as np
import pytest
import scipy.stats

from rm_robust.evaluation import bootstrap
from rm_robust.evaluation.bootstrap import Means, Stratum, differences, estimates, resampled_figures

NAN = math.nan


def mean_of_all(means: Means) -> dict[str, bootstrap.Array]:
    return {f"{stratum}.{name}": mean_B for stratum, columns in means.items() for name, mean_B in columns.items()}


def stratum(values: list[float], prompt_ids: list[str] | None = None) -> Stratum:
    return Stratum("s", prompt_ids or [str(i) for i in range(len(values))], {"x": values})


def test_the_value_is_the_mean_of_the_rows_that_have_one() -> None:
    assert estimates([stratum([1, 0, NAN, 1])], mean_of_all, seed=0)["s.x"].value == pytest.approx(2 / 3)


def test_a_figure_that_no_row_has_is_undefined() -> None:
    estimate = estimates([stratum([NAN, NAN])], mean_of_all, seed=0)["s.x"]
    assert [math.isnan(value) for value in (estimate.value, estimate.low, estimate.high)] == [True] * 3


def test_the_interval_of_independent_rows_is_the_normal_one() -> None:
    values = np.random.default_rng(1).normal(3.0, 2.0, size=2000)
    estimate = estimates([stratum(list(values))], mean_of_all, seed=0, num_resamples=4000)["s.x"]
    half_width = 1.96 * values.std() / math.sqrt(len(values))
    assert (estimate.low, estimate.high) == (
        pytest.approx(values.mean() - half_width, abs=0.01),
        pytest.approx(values.mean() + half_width, abs=0.01),
    )


def test_rows_of_one_prompt_count_as_one_observation() -> None:
    values = list(np.random.default_rng(2).normal(size=200))
    alone = estimates([stratum(values)], mean_of_all, seed=0)["s.x"]
    fourfold = estimates([stratum(values * 4, [str(i) for i in range(200)] * 4)], mean_of_all, seed=0)["s.x"]
    assert (fourfold.low, fourfold.high) == (pytest.approx(alone.low), pytest.approx(alone.high))


def test_a_stratum_is_resampled_alike_whatever_others_there_are() -> None:
    first, other = stratum([0, 1, 1, 0, 1]), Stratum("t", list("abc"), {"x": [1, 0, 0]})
    alone = resampled_figures([first], mean_of_all, seed=3, num_resamples=50)["s.x"]
    assert np.array_equal(alone, resampled_figures([other, first], mean_of_all, seed=3, num_resamples=50)["s.x"])


def test_resamples_drawn_in_parts_are_those_drawn_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = stratum(list(np.random.default_rng(4).normal(size=30)))
    at_once = resampled_figures([rows], mean_of_all, seed=0, num_resamples=100)["s.x"]
    monkeypatch.setattr(bootstrap, "_MAX_DRAWN", 30 * 7)
    assert resampled_figures([rows], mean_of_all, seed=0, num_resamples=100)["s.x"] == pytest.approx(at_once)


def test_a_difference_of_paired_values_has_the_interval_of_the_paired_test() -> None:
    rng = np.random.default_rng(5)
    common, first, second = rng.normal(0, 10, size=1000), rng.normal(0.1, 1, size=1000), rng.normal(0, 1, size=1000)
    difference = differences(
        [stratum(list(common + first))], [stratum(list(common + second))], mean_of_all, seed=0, num_resamples=4000
    )["s.x"]
    difference_N = first - second
    half_width = 1.96 * difference_N.std() / math.sqrt(1000)
    assert (difference.value, difference.low) == (
        pytest.approx(difference_N.mean()),
        pytest.approx(difference_N.mean() - half_width, abs=0.01),
    )
    assert difference.p_value == pytest.approx(scipy.stats.ttest_rel(common + first, common + second).pvalue, abs=0.02)
