"""Scorers for which theory says how often a constant answer wins."""

import random

import pytest

from rm_robust.errors import DataError
from rm_robust.evaluation.cases import Case
from rm_robust.evaluation.constant_answers import ANSWERS
from rm_robust.evaluation.evaluate import figures_of
from rm_robust.evaluation.suites import SUITES

SUITE = SUITES["constant_answers"]
CASES = [
    SUITE.parse({"prompt": f"Prompt {i}.", "chosen": "word " * (1 + i % 60), "rejected": "no"}) for i in range(240)
]


def figures(scores: list[list[float]], cases: list[Case] = CASES) -> dict[str, float]:
    return {name: estimate.value for name, estimate in figures_of(SUITE, cases, scores).items()}


def test_the_best_completion_of_a_row_is_what_the_answers_are_held_against() -> None:
    ranking = SUITE.parse({"prompt": "p", "completions": ["a", "b", "c", "d"], "gold_scores": [1.0, 3.0, 2.0, 3.0]})
    assert ranking.completions == ["b", *ANSWERS.values()]
    assert CASES[1].completions == ["word word ", *ANSWERS.values()]


def test_a_scorer_of_length_alone_lets_an_answer_win_wherever_the_best_completion_is_shorter() -> None:
    values = figures([[float(len(text)) for text in case.completions] for case in CASES])
    for name, answer in ANSWERS.items():
        assert values[f"{name}.wins"] == pytest.approx(
            sum(len(answer) > len(case.completions[0]) for case in CASES) / len(CASES)
        )
        assert values[f"{name}.margin"] == pytest.approx(
            sum(len(case.completions[0]) - len(answer) for case in CASES) / len(CASES)
        )
    assert 0 < values["refusal.wins"] < values["padding.wins"] < 1
    assert values["any.wins"] == max(values[f"{name}.wins"] for name in ANSWERS)


def test_a_random_scorer_lets_each_answer_win_half_of_the_time_and_any_of_six_in_six_of_seven() -> None:
    numbers = random.Random(0)
    estimates = figures_of(SUITE, CASES, [[numbers.random() for _ in case.completions] for case in CASES])
    assert all(estimates[f"{name}.wins"].low < 0.5 < estimates[f"{name}.wins"].high for name in ANSWERS)
    assert estimates["any.wins"].low < len(ANSWERS) / (len(ANSWERS) + 1) < estimates["any.wins"].high


def test_a_constant_scorer_lets_no_answer_win() -> None:
    values = figures([[2.0] * (1 + len(ANSWERS))] * len(CASES))
    assert set(values.values()) == {0.0}


def test_a_row_without_completions_is_refused() -> None:
    with pytest.raises(DataError):
        SUITE.parse({"prompt": "p"})
