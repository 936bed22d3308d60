import itertools
import math
import random
from dataclasses import replace

import pytest
from scipy.stats import kendalltau

from rm_robust.errors import DataError
from rm_robust.evaluation.cases import Case
from rm_robust.evaluation.evaluate import figures_of
from rm_robust.evaluation.preferences import best_of_n
from rm_robust.evaluation.suites import SUITES, preferences_by


def pair(number: int, chosen: str, rejected: str, subset: str = "s") -> Case:
    return SUITES["preferences"].parse(
        {"prompt": f"Prompt {number}.", "chosen": chosen, "rejected": rejected, "subset": subset}
    )


def ranked(number: int, gold_scores: list[float]) -> Case:
    return SUITES["preferences"].parse(
        {
            "prompt": f"Prompt {number}.",
            "completions": [f"c{i}" for i in range(len(gold_scores))],
            "gold_scores": gold_scores,
        }
    )


def figures(cases: list[Case], scores: list[list[float]]) -> dict[str, float]:
    return {name: estimate.value for name, estimate in figures_of(SUITES["preferences"], cases, scores).items()}


PAIRS = [pair(i, "word " * (1 + i % 3), "word " * 2, subset="even" if i % 2 == 0 else "odd") for i in range(300)]
"""Pairs whose chosen completion is shorter, as long and longer in turn."""


def test_accuracy_needs_chosen_strictly_above() -> None:
    values = figures(
        [pair(0, "a", "b"), pair(1, "a", "b"), pair(2, "a", "b"), pair(3, "a", "b")], [[1, 0], [0, 1], [1, 1], [3, 2]]
    )
    assert (values["s.accuracy"], values["s.tied_scores"]) == (0.5, 0.25)


def test_a_scorer_of_length_alone_always_lets_the_longer_win() -> None:
    values = figures(PAIRS, [[len(text) for text in case.completions] for case in PAIRS])
    assert (values["all.longer_wins"], values["all.accuracy_longer_chosen"], values["all.accuracy_shorter_chosen"]) == (
        1,
        1,
        0,
    )
    # Chosen is longer in a third of the pairs, and as long as rejected in another third.
    assert values["all.accuracy"] == pytest.approx(1 / 3)


def test_a_random_scorer_is_right_in_half_of_the_pairs_and_its_interval_holds_one_half() -> None:
    random_scores = random.Random(0)
    estimate = figures_of(
        SUITES["preferences"], PAIRS, [[random_scores.random(), random_scores.random()] for _ in PAIRS]
    )["all.accuracy"]
    assert estimate.low < 0.5 < estimate.high
    assert estimate.high - estimate.low == pytest.approx(2 * 1.96 * math.sqrt(0.25 / len(PAIRS)), rel=0.1)


def test_a_constant_scorer_is_never_right_and_all_of_its_scores_are_tied() -> None:
    values = figures(PAIRS, [[0.0, 0.0]] * len(PAIRS))
    assert (values["all.accuracy"], values["all.tied_scores"], values["all.longer_wins"]) == (0, 1, 0)


def test_tau_is_scipys_over_prompts_whose_gold_differs_and_constant_scores_count_as_none() -> None:
    gold, scores = (
        [[3.0, 1.0, 2.0, 2.0], [1.0, 1.0, 1.0], [1.0, 2.0, 3.0]],
        [[0.1, 0.3, 0.2, 0.2], [1.0, 2.0, 3.0], [5.0, 5.0, 5.0]],
    )
    expected = (kendalltau(scores[0], gold[0]).statistic + 0) / 2
    assert figures([ranked(i, gold_scores) for i, gold_scores in enumerate(gold)], scores)[
        "all.kendall_tau"
    ] == pytest.approx(expected)


def test_all_prompts_together_weigh_alike_whatever_their_subset() -> None:
    cases = [pair(0, "a", "b", "one"), pair(1, "a", "b", "two"), pair(2, "a", "b", "two"), pair(3, "a", "b", "two")]
    values = figures(cases, [[1, 0], [0, 1], [0, 1], [1, 0]])
    assert (values["one.accuracy"], values["two.accuracy"], values["all.accuracy"]) == (1, pytest.approx(1 / 3), 0.5)


def test_figures_that_no_pair_has_are_left_out() -> None:
    assert set(figures([pair(0, "a", "b")], [[1, 0]])) == {
        f"{subset}.{name}"
        for subset in ("s", "all")
        for name in ("tied_scores", "accuracy", "brier", "calibration_error")
    }


def test_the_brier_score_of_pairs_is_that_of_the_bradley_terry_probability() -> None:
    margins = [0.0, 2.0, -1.0]
    expected = sum((1 - 1 / (1 + math.exp(-margin))) ** 2 for margin in margins) / 3
    assert figures([pair(i, "a", "b") for i in range(3)], [[margin, 0.0] for margin in margins])[
        "all.brier"
    ] == pytest.approx(expected)


def test_calibration_error_is_that_of_bins_of_confidence() -> None:
    # sigma(0.2) = 0.5498 comes twice in the bin from 0.5, and is right once. sigma(3) = 0.953 comes twice in the bin up
    # to 1, and is right both times.
    low, high = 1 / (1 + math.exp(-0.2)), 1 / (1 + math.exp(-3))
    scores = [[0.2, 0.0], [0.0, 0.2], [3.0, 0.0], [3.0, 0.0]]
    cases = [pair(i, "a", "b", subset="one" if i < 2 else "two") for i in range(4)]
    values = figures(cases, scores)
    assert values["one.calibration_error"] == pytest.approx(abs(0.5 - low))
    assert values["all.calibration_error"] == pytest.approx(0.5 * abs(0.5 - low) + 0.5 * (1 - high))


def test_the_reliability_curve_has_the_bins_of_the_calibration_error() -> None:
    margins = [0.1, 0.1, -0.1, 1.5, 1.5, 9.0]
    cases, scores = [pair(i, "a", "b") for i in range(len(margins))], [[margin, 0.0] for margin in margins]
    bins = SUITES["preferences"].details(cases, scores)["reliability"]
    assert [bin_["num_pairs"] for bin_ in bins] == [3, 2, 1]
    assert [bin_["accuracy"] for bin_ in bins] == pytest.approx([2 / 3, 1, 1])
    assert [bin_["mean_confidence"] for bin_ in bins] == pytest.approx(
        [1 / (1 + math.exp(-margin)) for margin in (0.1, 1.5, 9.0)]
    )
    gaps = [bin_["num_pairs"] / len(margins) * abs(bin_["accuracy"] - bin_["mean_confidence"]) for bin_ in bins]
    assert figures(cases, scores)["all.calibration_error"] == pytest.approx(sum(gaps))
    assert SUITES["preferences"].details([ranked(0, [0.0, 1.0, 2.0])], [[0.0, 1.0, 2.0]]) == {}


def test_calibration_error_has_no_interval_for_resampling_biases_it() -> None:
    estimate = figures_of(SUITES["preferences"], PAIRS, [[1.0, 0.0]] * len(PAIRS))["all.calibration_error"]
    assert [math.isnan(value) for value in (estimate.value, estimate.low, estimate.high)] == [False, True, True]


def test_all_is_resampled_over_all_prompts_whatever_the_subsets() -> None:
    scores = [[float(i % 5), 2.0] for i in range(len(PAIRS))]
    apart = [replace(case, subset=str(index)) for index, case in enumerate(PAIRS)]
    assert (
        figures_of(SUITES["preferences"], apart, scores)["all.accuracy"]
        == figures_of(SUITES["preferences"], PAIRS, scores)["all.accuracy"]
    )


def test_a_ranking_of_two_is_no_pair_whatever_its_order() -> None:
    values = figures([ranked(0, [1.0, 0.0]), ranked(1, [0.0, 1.0])], [[1.0, 0.0], [1.0, 0.0]])
    assert "all.accuracy" not in values
    assert values["all.kendall_tau"] == 0


def test_rows_without_a_subset_beside_others_are_called_unnamed() -> None:
    cases = [pair(0, "a", "b", "one"), SUITES["preferences"].parse({"prompt": "p", "chosen": "a", "rejected": "b"})]
    values = figures(cases, [[1, 0], [0, 1]])
    assert (values["one.accuracy"], values["unnamed.accuracy"], values["all.accuracy"]) == (1, 0, 0.5)


def test_a_subset_called_all_is_refused() -> None:
    with pytest.raises(DataError, match="may not be called 'all'"):
        pair(0, "a", "b", "all")


def test_overconfidence_is_seen() -> None:
    random_scores = random.Random(0)
    margins = [random_scores.choice([-8.0, 8.0]) for _ in PAIRS]
    values = figures(PAIRS, [[margin, 0.0] for margin in margins])
    assert values["all.calibration_error"] == pytest.approx(abs(values["all.accuracy"] - 1 / (1 + math.exp(-8))))


@pytest.mark.parametrize(
    ("scores", "n", "expected"),
    [
        ([1.0, 2.0, 3.0, 4.0], 1, 2.5),  # one draw: the mean
        ([1.0, 2.0, 3.0, 4.0], 4, 4.0),  # all: the best
        ([1.0, 2.0, 3.0, 4.0], 2, (1 * 2 + 2 * 3 + 3 * 4) / 6),  # best of the six pairs
        ([4.0, 3.0, 2.0, 1.0], 4, 1.0),  # the model is wrong about everything
        ([7.0, 7.0, 7.0, 7.0], 2, 2.5),  # the model gives all the same score: any of them
        ([1.0, 9.0, 9.0, 0.0], 4, 2.5),  # two share the top
    ],
)
def test_best_of_n_is_its_expectation_over_all_draws(scores: list[float], n: int, expected: float) -> None:
    assert best_of_n(scores, [1.0, 2.0, 3.0, 4.0], n) == pytest.approx(expected)


def test_best_of_n_is_what_drawing_gives() -> None:
    rng = random.Random(1)
    scores, gold = [[rng.gauss(0, 1) for _ in range(9)] for _ in range(2)]
    draws = [max(draw, key=lambda index: scores[index]) for draw in itertools.combinations(range(9), 4)]
    assert best_of_n(scores, gold, 4) == pytest.approx(sum(gold[index] for index in draws) / len(draws))


def test_prompts_of_few_completions_have_no_best_of_more() -> None:
    values = figures([ranked(0, [1.0, 2.0, 3.0, 4.0]), ranked(1, [1.0, 2.0])], [[1.0, 2.0, 3.0, 4.0], [2.0, 1.0]])
    assert (values["all.best_of_1"], values["all.best_of_2"], values["all.best_of_4"]) == (
        2.0,
        pytest.approx((20 / 6 + 1) / 2),
        4.0,
    )


def test_a_column_that_the_user_names_tells_the_subset() -> None:
    row = {"prompt": "p", "chosen": "a", "rejected": "b", "goal": "harmlessness", "source": "x"}
    assert [suite.parse(row).subset for suite in (preferences_by("goal"), SUITES["preferences"])] == [
        "harmlessness",
        "x",
    ]


def test_a_row_that_is_neither_a_pair_nor_a_ranking_is_refused() -> None:
    with pytest.raises(DataError, match="neither pairs"):
        SUITES["preferences"].parse({"text": "hello"})
