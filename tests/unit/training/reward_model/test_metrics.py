"""Accuracy and tau-b against hand counts and scipy, and how the cases without information are counted."""

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import kendalltau

from rm_robust.training.reward_model.metrics import (
    ScenarioResult,
    mean_kendall_tau,
    ordered_alike,
    pairwise_accuracy,
    squared_errors,
)

GOLD = [1.0, 2.0, 3.0, 4.0]


def tau(scores: list[float], gold: list[float]) -> float:
    return mean_kendall_tau([scores], [gold]).value


def test_accuracy_counts_strictly_better_chosen_and_takes_ties_as_wrong() -> None:
    scores = [[1.0, 0.0], [0.0, 1.0], [2.0, 2.0], [-1.0, -2.0]]
    assert pairwise_accuracy(scores) == ScenarioResult(
        "accuracy", 0.5, num_prompts=4, num_undefined=0, num_constant_scores=1
    )


def test_tau_of_a_permutation_is_one_minus_two_times_its_inversions_over_all_pairs() -> None:
    for permutation in itertools.permutations(GOLD):
        inversions = sum(a > b for a, b in itertools.combinations(permutation, 2))
        assert tau(list(permutation), GOLD) == pytest.approx(1 - 2 * inversions / 6)
        assert tau(list(permutation), GOLD) == pytest.approx(kendalltau(permutation, GOLD).statistic)


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=2, max_size=6))
def test_tau_with_ties_is_scipys_tau_b(rows: list[tuple[int, int]]) -> None:
    scores, gold = [float(a) for a, _ in rows], [float(b) for _, b in rows]
    if len(set(scores)) > 1 and len(set(gold)) > 1:
        assert tau(scores, gold) == pytest.approx(kendalltau(scores, gold, variant="b").statistic)


def test_a_tie_lowers_tau_b_by_the_square_root_rule() -> None:
    """Five of six pairs agree, one is tied in the scores only: 5 / sqrt(5 * 6)."""
    assert tau([1.0, 2.0, 3.0, 3.0], GOLD) == pytest.approx(5 / (5 * 6) ** 0.5)


def test_constant_scores_count_as_zero_and_constant_gold_is_left_out_and_both_are_counted() -> None:
    scores = [GOLD, [7.0] * 4, GOLD, [7.0] * 4]
    gold = [GOLD, GOLD, [0.0] * 4, [0.0] * 4]
    assert mean_kendall_tau(scores, gold) == ScenarioResult(
        "kendall_tau_b", 0.5, num_prompts=4, num_undefined=2, num_constant_scores=1
    )


def test_the_mean_is_over_prompts_whatever_their_number_of_completions() -> None:
    assert mean_kendall_tau([[1.0, 2.0], [4.0, 3.0, 2.0, 1.0]], [[1.0, 2.0], GOLD]).value == pytest.approx(0)


def test_nothing_to_measure_is_an_error_and_not_a_number() -> None:
    with pytest.raises(ValueError, match="at least one pair"):
        pairwise_accuracy([])
    with pytest.raises(ValueError, match="got 1 with constant gold"):
        mean_kendall_tau([[1.0, 2.0]], [[3.0, 3.0]])


def test_only_pairs_with_different_gold_scores_are_compared() -> None:
    """Two pairs are wrong: completions 0 and 2, and the tied completions 2 and 3."""
    is_right = ordered_alike([3.0, 1.0, 2.0, 2.0], [1.0, 0.0, 2.0, 0.0])
    assert sorted(is_right) == [False, False, True, True, True]


def test_squared_errors_are_those_of_sigmoid_of_the_difference_and_finite_at_any_score() -> None:
    assert squared_errors([math.log(3.0), 0.0], [1.0, 0.0]) == pytest.approx([1 / 16])  # sigmoid(log 3) = 3/4
    assert squared_errors([5.0, 5.0], [0.0, 1.0]) == pytest.approx([1 / 4])
    assert squared_errors([1e30, -1e30], [1.0, 0.0]) == [0.0]
    assert squared_errors([-1e30, 1e30], [1.0, 0.0]) == [1.0]
    assert squared_errors([1.0, 2.0], [0.5, 0.5]) == []
