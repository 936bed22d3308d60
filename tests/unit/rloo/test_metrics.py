"""Every number of a step's report, worked out by hand from two prompts with two completions."""

import pytest
import torch

from rm_robust.rloo.advantages import Advantages, StepScores, leave_one_out_advantages
from rm_robust.rloo.metrics import rollout_metrics
from rm_robust.rloo.rollout import Completion, Measurement, PromptCompletions


def completion(num_tokens: int, *, is_truncated: bool = False) -> Completion:
    return Completion([5] * num_tokens, [-0.1] * num_tokens, is_truncated, 0)


COMPLETIONS = [
    PromptCompletions("a", [3], [completion(1), completion(3)]),
    PromptCompletions("b", [4], [completion(4, is_truncated=True), completion(8)]),
]


def scores_of(proxy: list[list[float]], gold: list[list[float]] | None) -> StepScores:
    return StepScores({"proxy": proxy}, gold, torch.tensor(proxy), {"proxy": 0}, {}, 0)


def metrics(rewards: list[list[float]], *, gold: list[list[float]] | None = None) -> dict[str, float]:
    rewards_PK = torch.tensor(rewards)
    return rollout_metrics(
        COMPLETIONS,
        scores_of([[1.0, 3.0], [5.0, 7.0]], gold),
        [
            Measurement(
                kl=[0.5, 1.5],
                num_tokens=4,
                entropy_mean=2.0,
                sampler_gap_mean=0.1,
                sampler_gap_max=0.3,
                sampler_kl_mean=0.01,
            ),
            Measurement(
                kl=[2.0, 4.0],
                num_tokens=12,
                entropy_mean=1.0,
                sampler_gap_mean=0.5,
                sampler_gap_max=0.2,
                sampler_kl_mean=0.05,
            ),
        ],
        Advantages(rewards_PK, leave_one_out_advantages(rewards_PK).nan_to_num(0.0), num_without_baseline=1),
        kl_PK=torch.tensor([[0.5, 1.5], [2.0, 4.0]]),
    )


def test_means_are_over_all_completions_and_token_means_over_all_tokens_of_all_trainers() -> None:
    """The population deviations are sqrt((9 + 1 + 1 + 9) / 4) and 1/2, the entropy is (4 * 2 + 12 * 1) / 16.

    The gap is (4 * 0.1 + 12 * 0.5) / 16, and the advantages are -1, 1, -3, 3.
    """
    assert metrics([[1.0, 2.0], [3.0, 6.0]], gold=[[0.0, 0.0], [1.0, 1.0]]) == pytest.approx(
        {
            "rloo/proxy_score_mean": 4.0,
            "rloo/proxy_score_std": 5**0.5,
            "rloo/gold_score_mean": 0.5,
            "rloo/gold_score_std": 0.5,
            "rloo/reward_mean": 3.0,
            "rloo/num_failed_scores": 0,
            "rloo/failed_score_fraction": 0.0,
            "rloo/num_checkpoint_changes": 0,
            "rloo/constant_reward_fraction": 0.0,
            "rloo/without_gradient_fraction": 0.0,
            "rloo/num_without_baseline": 1,
            "rloo/advantage_std": 5**0.5,
            "rloo/kl_mean": 2.0,
            "rloo/entropy_mean": 1.25,
            "rloo/sampler_gap_mean": 0.4,
            "rloo/sampler_gap_max": 0.3,
            "rloo/sampler_kl_mean": 0.04,
            "rloo/completion_tokens_mean": 4.0,
            "rloo/truncated_fraction": 0.25,
            "rloo/num_completions": 4,
        }
    )


def test_prompts_whose_rewards_are_equal_teach_nothing_and_are_counted() -> None:
    assert metrics([[0.1, 0.1], [0.3, 0.4]])["rloo/constant_reward_fraction"] == 0.5


def test_equal_rewards_that_have_no_exact_mean_count_as_equal() -> None:
    rewards_PK = torch.full((1, 7), 0.1)
    constant = rollout_metrics(
        [PromptCompletions("a", [3], [completion(2)] * 7)],
        scores_of([[0.0] * 7], None),
        [Measurement([0.0] * 7, 14, 1.0, 0.0, 0.0, 0.0)],
        Advantages(rewards_PK, torch.zeros(1, 7), 0),
        kl_PK=torch.zeros(1, 7),
    )
    assert constant["rloo/constant_reward_fraction"] == 1.0


def test_a_step_without_gold_has_no_gold_metric_and_a_missing_reward_is_in_no_mean() -> None:
    without_gold = metrics([[1.0, torch.nan], [3.0, 5.0]])
    assert not any("gold" in key for key in without_gold)
    assert (without_gold["rloo/reward_mean"], without_gold["rloo/without_gradient_fraction"]) == (3.0, 0.5)
