"""Figures of RewardBench worked out by hand. tests/compat compares them with reward-bench's own functions."""

import math
from dataclasses import replace

import pytest

from rm_robust.errors import DataError
from rm_robust.evaluation import reward_bench
from rm_robust.evaluation.cases import Case
from rm_robust.evaluation.evaluate import figures_of
from rm_robust.evaluation.suites import SUITES


def pair(number: int, subset: str) -> Case:
    return reward_bench.parse_1(
        {"id": number, "subset": subset, "prompt": f"Prompt {number}.", "chosen": "yes", "rejected": "no"}
    )


def best_of(own_id: str, subset: str, *, num_right: int = 1, num_wrong: int = 3) -> Case:
    row = {
        "id": own_id,
        "subset": subset,
        "prompt": f"Prompt {own_id}.",
        "chosen": ["yes"] * num_right,
        "rejected": ["no"] * num_wrong,
    }
    return replace(reward_bench.parse_2(row), own_id=own_id)


def figures(suite: str, cases: list[Case], scores: list[list[float]]) -> dict[str, float]:
    return {name: estimate.value for name, estimate in figures_of(SUITES[suite], cases, scores).items()}


def test_a_section_weighs_its_subsets_by_the_benchmarks_counts_and_a_tie_is_wrong() -> None:
    cases = [pair(0, "alpacaeval-easy"), pair(1, "alpacaeval-easy"), pair(2, "mt-bench-easy"), pair(3, "hep-go")]
    values = figures("reward_bench", cases, [[1, 0], [1, 1], [2, 1], [0, 1]])
    assert values["alpacaeval-easy.accuracy"] == 0.5
    assert values["Chat.accuracy"] == pytest.approx((100 * 0.5 + 28 * 1) / 128)
    assert values["overall.accuracy"] == pytest.approx((values["Chat.accuracy"] + 0) / 2)
    assert "Safety.accuracy" not in values


def test_the_highest_score_shared_by_several_is_worth_a_share() -> None:
    cases = [best_of("0", "Math"), best_of("1", "Math"), best_of("2", "Math")]
    assert figures("reward_bench_2", cases, [[2, 2, 1, 0], [3, 2, 1, 0], [1, 2, 0, 0]])[
        "Math.accuracy"
    ] == pytest.approx((0.5 + 1 + 0) / 3)


def test_ties_reward_right_answers_that_lie_closer_to_each_other_than_to_the_wrong_ones() -> None:
    cases = [best_of("ref:0", "Ties"), best_of("tied:0", "Ties", num_right=3, num_wrong=2)]
    # tied: the right answers have 4.5 to 5.0, the best wrong one 3.5, so the margins are 0.5 and 1.
    # ref: 4 against 2, so the margin is 2. The smaller margin to a wrong answer is 1, which is twice 0.5.
    values = figures("reward_bench_2", cases, [[4, 2, 1, 0], [5, 4.5, 4.75, 3.5, 0]])
    assert values["Ties.accuracy"] == pytest.approx(0.3 + 0.3 + 0.2 + 0.2 + 0.01 * math.tanh(1))


def test_equal_scores_of_all_right_answers_have_no_margin_to_compare() -> None:
    cases = [best_of("ref:7", "Ties"), best_of("tied:7", "Ties", num_right=2, num_wrong=1)]
    assert figures("reward_bench_2", cases, [[0, 2, 1, 0], [5, 5, 3]])["Ties.accuracy"] == pytest.approx(
        0.3 + 0 + 0.2 + 0
    )


def test_an_id_of_ties_that_is_there_twice_is_refused() -> None:
    with pytest.raises(DataError, match="ref:1 of Ties is there twice"):
        figures("reward_bench_2", [best_of("ref:1", "Ties"), best_of("ref:1", "Ties")], [[1, 0, 0, 0], [1, 0, 0, 0]])


def test_missing_subsets_are_named() -> None:
    assert reward_bench.notes_2([best_of("0", subset) for subset in ("Math", "Focus", "Safety", "Precise IF")]) == [
        "not the full benchmark: there is no factuality, no ties"
    ]
    assert "no alpacaeval-easy" in reward_bench.notes_1([pair(0, "hep-go")])[0]


def test_overall_is_the_mean_of_the_subsets() -> None:
    cases = [best_of("0", "Math"), best_of("1", "Focus"), best_of("2", "Focus")]
    assert figures("reward_bench_2", cases, [[1, 0, 0, 0], [1, 0, 0, 0], [0, 1, 0, 0]])[
        "overall.accuracy"
    ] == pytest.approx((1 + 0.5) / 2)


@pytest.mark.parametrize(
    ("parse", "row"),
    [
        (reward_bench.parse_1, {"subset": "poems"}),
        (reward_bench.parse_1, {"subset": "hep-go", "chosen": ["a list"]}),
        (reward_bench.parse_2, {"subset": "poems"}),
        (reward_bench.parse_2, {"subset": "Math", "chosen": ["one", "two"]}),
        (reward_bench.parse_2, {"subset": "Ties", "chosen": ["one", "two"], "id": "17"}),
    ],
)
def test_a_row_of_another_benchmark_is_refused(parse, row) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(DataError):
        parse({"id": "1", "prompt": "Prompt.", "chosen": "yes", "rejected": "no"} | row)
