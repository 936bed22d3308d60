"""The scoring bench's arithmetic, worked out by hand."""

import pytest

from research.bench.scoring_figures import percentile, ratio_of_rounds, token_limit


def test_a_percentile_is_the_smallest_value_that_enough_values_do_not_exceed() -> None:
    values = [float(value) for value in range(200, 0, -1)]  # 200 down to 1
    assert percentile(values, 50) == 100
    assert percentile(values, 99) == 198
    assert percentile(values, 100) == 200
    assert percentile([7.0], 99) == 7
    assert percentile([1.0, 2.0, 3.0], 50) == 2


def test_the_ratio_of_rounds_is_the_median_of_each_rounds_own() -> None:
    # A slow machine in round 3 halves both sides: 2, 3, 2. The ratio of the medians would be 30 / 10 = 3.
    assert ratio_of_rounds([20, 30, 40], [10, 10, 20]) == 2


def test_rounds_must_come_in_pairs() -> None:
    with pytest.raises(ValueError, match="shorter"):
        ratio_of_rounds([1.0, 2.0], [1.0])


def test_the_token_limit_counts_a_prompt_once_for_all_its_completions() -> None:
    # Single: 4 * 90 + 40 and 2 * 10 + 30; shared: 90 + 40 and 10 + 30.
    assert token_limit([(90, [10, 10, 10, 10]), (10, [10, 20])]) == pytest.approx((400 + 50) / (130 + 40))


def test_a_single_completion_gains_nothing() -> None:
    assert token_limit([(90, [10])]) == 1
