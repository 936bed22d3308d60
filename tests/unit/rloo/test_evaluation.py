"""Win rates worked out by hand; length-controlled ones against a closed form and another optimiser."""

import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from rm_robust.data.chat import ChatFormat
from rm_robust.data.token_files import read_token_groups
from rm_robust.errors import RefusedInputError, RolloutError
from rm_robust.rloo.actors import RlooActors
from rm_robust.rloo.evaluation import (
    RIDGE,
    JudgedCompletions,
    PolicyComparison,
    PolicyEvaluation,
    compare_policies,
    length_controlled_win_rate,
)
from rm_robust.rloo.rollout import Completion, PromptCompletions
from rm_robust.runs.layout import RunLayout
from rm_robust.scoring.contract import ScoreInput, ScoreReply, ScoreResult
from tests.support.rloo_run import rloo_config, rloo_run_dir

Floats = NDArray[np.float64]


def sampled(
    seed: int, *, quality: float, per_token: float, more_tokens: float, num_prompts: int = 300
) -> PolicyComparison:
    """Compare policies with 4 completions a prompt.

    A gold score is noise + per_token * length; the policy's has `quality` on top, and it writes about `more_tokens`
    more.
    """
    rng = np.random.default_rng(seed)
    sides = []
    for is_policy in (1, 0):
        num_tokens_QK = np.rint(rng.normal(30 + is_policy * more_tokens, 8, (num_prompts, 4))).astype(int)
        gold_QK = rng.normal(size=(num_prompts, 4)) + per_token * num_tokens_QK + is_policy * quality
        sides.append(JudgedCompletions(gold_QK.tolist(), num_tokens_QK.tolist()))
    return compare_policies(*sides)


def test_means_win_rate_and_error_by_hand() -> None:
    """Win rate of prompt 1: 2 > 1 and 2 = 2, so 3/4; of prompt 2: 0; of prompt 3: 1. Their mean is 7/12.

    The standard error is the deviation of 3/4, 0 and 1 over sqrt(3).
    """
    policy = JudgedCompletions([[2.0], [0.0], [5.0, 7.0]], [[10], [20], [30, 40]])
    sft = JudgedCompletions([[1.0, 2.0], [4.0], [3.0]], [[10, 10], [20], [30]])
    comparison = compare_policies(policy, sft)
    assert comparison.gold_mean == pytest.approx((2 + 0 + 6) / 3)
    assert comparison.sft_gold_mean == pytest.approx((1.5 + 4 + 3) / 3)
    assert comparison.win_rate == pytest.approx(7 / 12)
    squares = (3 / 4 - 7 / 12) ** 2 + (7 / 12) ** 2 + (1 - 7 / 12) ** 2
    assert comparison.win_rate_se == pytest.approx(math.sqrt(squares / 2) / math.sqrt(3))
    assert comparison.completion_tokens_mean == pytest.approx(65 / 3)
    assert (comparison.sft_completion_tokens_mean, comparison.num_prompts) == (20, 3)


def test_metrics_are_named_after_the_fields() -> None:
    comparison = sampled(0, quality=0.5, per_token=0.0, more_tokens=0.0, num_prompts=20)
    assert set(comparison.metrics()) == {
        "rloo/eval/gold_mean",
        "rloo/eval/sft_gold_mean",
        "rloo/eval/win_rate",
        "rloo/eval/win_rate_se",
        "rloo/eval/length_controlled_win_rate",
        "rloo/eval/completion_tokens_mean",
        "rloo/eval/sft_completion_tokens_mean",
        "rloo/eval/num_prompts",
    }
    assert comparison.metrics()["rloo/eval/win_rate"] == comparison.win_rate


def test_all_ties_are_one_half() -> None:
    comparison = compare_policies(
        JudgedCompletions([[1.0, 1.0]] * 5, [[9, 30]] * 5), JudgedCompletions([[1.0, 1.0]] * 5, [[5, 7]] * 5)
    )
    assert (comparison.win_rate, comparison.win_rate_se) == (0.5, 0.0)
    assert comparison.length_controlled_win_rate == pytest.approx(0.5, abs=1e-9)


def test_if_the_longer_completion_always_wins_the_win_rate_at_equal_length_is_one_half() -> None:
    rng = np.random.default_rng(0)
    policy_QK, sft_QK = rng.integers(10, 60, (200, 4)), rng.integers(5, 45, (200, 4))
    policy, sft = (JudgedCompletions(tokens.astype(float).tolist(), tokens.tolist()) for tokens in (policy_QK, sft_QK))
    comparison = compare_policies(policy, sft)
    assert comparison.win_rate > 0.65
    assert comparison.length_controlled_win_rate == pytest.approx(0.5, abs=0.05)


def test_a_better_policy_that_is_not_longer_keeps_its_win_rate() -> None:
    comparison = sampled(1, quality=0.7, per_token=0.0, more_tokens=0.0)
    assert comparison.win_rate == pytest.approx(0.69, abs=0.03)  # P(N(0.7, 2) > 0) = 0.690
    assert comparison.length_controlled_win_rate == pytest.approx(comparison.win_rate, abs=0.01)


def test_a_longer_policy_is_credited_with_its_quality_alone() -> None:
    """At any equal length the difference of scores is N(0.7, 2), so the rate is 0.69.

    The tanh bends the effect of the length, so the tolerance is wide.
    """
    for quality, expected in ((0.7, 0.69), (0.0, 0.5), (-0.7, 0.31)):
        comparison = sampled(2, quality=quality, per_token=0.1, more_tokens=8.0)
        assert comparison.win_rate > expected + 0.05
        assert comparison.length_controlled_win_rate == pytest.approx(expected, abs=0.04)


def test_length_control_by_closed_form() -> None:
    """Lengths differ by +d or -d, so two coefficients fit two cells exactly.

    The constant is the mean of the two log-odds: rates 0.9 and 0.5 give ln(9) / 2, so 3/4.
    """
    preferences_M = np.repeat([1.0, 0.0, 1.0, 0.0], [900, 100, 500, 500])
    differences_M = np.repeat([7.0, -7.0], 1000)
    assert length_controlled_win_rate(preferences_M, differences_M, np.ones(2000)) == pytest.approx(0.75, abs=1e-4)


def newton(preferences_M: Floats, differences_M: Floats, weights_M: Floats) -> float:
    """Compute the same rate by Newton's method with halved steps, written independently."""
    mean = (weights_M * differences_M).sum() / weights_M.sum()
    spread = math.sqrt((weights_M * (differences_M - mean) ** 2).sum() / weights_M.sum())
    x_M = np.tanh(differences_M / spread)

    def loss(a: float, b: float) -> float:
        p_M = 1 / (1 + np.exp(-(a + b * x_M)))
        return float(
            -(weights_M * (preferences_M * np.log(p_M) + (1 - preferences_M) * np.log(1 - p_M))).sum()
            + RIDGE / 2 * (a * a + b * b)
        )

    a = b = 0.0
    for _ in range(100):
        p_M = 1 / (1 + np.exp(-(a + b * x_M)))
        error_M, curve_M = weights_M * (p_M - preferences_M), weights_M * p_M * (1 - p_M)
        gradient = np.array([error_M.sum() + RIDGE * a, (error_M * x_M).sum() + RIDGE * b])
        cross = (curve_M * x_M).sum()
        step = np.linalg.solve([[curve_M.sum() + RIDGE, cross], [cross, (curve_M * x_M**2).sum() + RIDGE]], gradient)
        scale = 1.0
        while scale > 1e-9 and loss(a - scale * step[0], b - scale * step[1]) > loss(a, b):
            scale /= 2
        a, b = a - scale * step[0], b - scale * step[1]
    return float(1 / (1 + math.exp(-a)))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from([0.0, 0.5, 1.0]), st.integers(-60, 60), st.sampled_from([0.25, 1.0])),
        min_size=3,
        max_size=40,
    )
)
def test_the_fit_is_that_of_another_optimiser_also_on_separable_data(rows: list[tuple[float, int, float]]) -> None:
    preferences_M, differences_M, weights_M = (np.array(column, dtype=np.float64) for column in zip(*rows, strict=True))
    if np.ptp(differences_M) == 0:
        differences_M[0] += 1
    assert length_controlled_win_rate(preferences_M, differences_M, weights_M) == pytest.approx(
        newton(preferences_M, differences_M, weights_M), abs=1e-5
    )


def test_swapping_the_policies_turns_every_rate_into_its_complement() -> None:
    rng = np.random.default_rng(5)
    sides = [
        JudgedCompletions(rng.normal(size=(40, 3)).tolist(), rng.integers(5, 50, (40, 3)).tolist()) for _ in range(2)
    ]
    forward, swapped = compare_policies(sides[0], sides[1]), compare_policies(sides[1], sides[0])
    assert forward.win_rate + swapped.win_rate == pytest.approx(1)
    assert forward.length_controlled_win_rate + swapped.length_controlled_win_rate == pytest.approx(1, abs=1e-6)
    assert forward.win_rate_se == pytest.approx(swapped.win_rate_se)


def test_a_constant_length_difference_gives_length_half_of_the_log_odds() -> None:
    """800 of 1000 pairs are wins, and the policy is always 5 longer: the log-odds are ln 4, half of it is odds 2."""
    preferences_M = np.repeat([1.0, 0.0], [800, 200])
    assert length_controlled_win_rate(preferences_M, np.full(1000, 5.0), np.ones(1000)) == pytest.approx(
        2 / 3, abs=1e-3
    )
    assert length_controlled_win_rate(preferences_M, np.zeros(1000), np.ones(1000)) == pytest.approx(0.8, abs=1e-3)


def test_a_policy_that_always_wins_has_a_finite_fit_near_one() -> None:
    rng = np.random.default_rng(0)
    rate = length_controlled_win_rate(np.ones(64), rng.normal(size=64), np.ones(64))
    assert 0.99 < rate < 1


def test_prompts_without_scores_of_both_are_left_out_of_the_count() -> None:
    policy, sft = (
        JudgedCompletions([[1.0], [], [2.0], [3.0]], [[5], [], [5], [5]]),
        JudgedCompletions([[0.0], [9.0], [], [4.0]], [[5], [5], [], [5]]),
    )
    comparison = compare_policies(policy, sft)
    assert (comparison.num_prompts, comparison.win_rate, comparison.gold_mean) == (2, 0.5, 2.0)
    with pytest.raises(RolloutError, match="of 1 only 1"):
        compare_policies(JudgedCompletions([[1.0]], [[5]]), JudgedCompletions([[1.0]], [[5]]))


class RefusingJudge:
    """A judge that refuses the texts in `refused`, as it refuses one that is too long; the others score 1."""

    def __init__(self, refused: set[str]) -> None:
        self.refused = refused

    def score(self, inputs: Sequence[ScoreInput]) -> ScoreReply:
        if self.refused & {completion for item in inputs for completion in item.completions}:
            raise RefusedInputError("HTTP 413: too long")
        results = [ScoreResult(scores=[1.0] * len(item.completions)) for item in inputs]
        return ScoreReply(model="judge", checkpoint="judge", results=results)


def evaluation_with(folder: Path, *, num_refused: int) -> PolicyEvaluation:
    """Return an evaluation on 10 prompts, of which the judge refuses the answers to the first `num_refused`."""
    config = rloo_config(folder)
    layout = RunLayout(rloo_run_dir(config, folder / "run", num_prompts=10))
    chat = ChatFormat.load(str(config.model.path))
    prompts = read_token_groups(layout.rloo_prompts / "scenario=rloo_prompts")
    ids = [chat.tokenizer(word, add_special_tokens=False)["input_ids"] for word in "abcdefghij"]
    answers = [
        PromptCompletions(prompt.group_id, [1], [Completion(given, [0.0] * len(given), False, 0)])
        for prompt, given in zip(prompts, ids, strict=True)
    ]
    refused = {chat.completion_text(given) for given in ids[:num_refused]}
    return PolicyEvaluation(
        layout,
        prompts,
        config.rloo,
        chat=chat,
        seed=0,
        gold=RefusingJudge(refused),
        sample=lambda requests: answers,
        actors=object.__new__(RlooActors),  # the baseline needs none
    )


def test_a_gold_answer_that_is_refused_is_left_out_and_counted_and_too_many_end_the_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """rloo.max_failed_score_fraction is 0.2: two of ten may fail, as in a step."""
    evaluation_with(tmp_path / "two", num_refused=2).sample_baseline(0)
    baseline = json.loads(RunLayout(tmp_path / "two" / "run").rloo_baseline.read_text())
    assert [len(scores) for scores in baseline["gold_scores"]] == [0, 0] + [1] * 8
    assert [len(lengths) for lengths in baseline["num_tokens"]] == [0, 0] + [1] * 8
    assert "2 of 10 gold scores of the evaluation failed and are left out; the last one: HTTP 413" in caplog.text
    with pytest.raises(RolloutError, match="gold gave no score to 3 of .* allows 2. The last reason: HTTP 413"):
        evaluation_with(tmp_path / "three", num_refused=3).sample_baseline(0)
