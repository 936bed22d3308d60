"""Leave-one-out advantages against a naive loop, and what a reward is made of."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rm_robust.config.rloo import RlooConfig
from rm_robust.rloo.advantages import (
    advantages_of,
    leave_one_out_advantages,
    next_kl_coefficient,
    sequence_kl,
    sum_by_completion,
    token_kl,
)

rewards = st.integers(2, 6).flatmap(
    lambda k: st.lists(st.lists(st.floats(-50, 50, width=32), min_size=k, max_size=k), min_size=1, max_size=5)
)


def naive(rewards_PK: list[list[float]]) -> list[list[float]]:
    advantages = []
    for row in rewards_PK:
        others = [row[:k] + row[k + 1 :] for k in range(len(row))]
        advantages.append([reward - sum(rest) / len(rest) for reward, rest in zip(row, others, strict=True)])
    return advantages


@given(rewards)
def test_an_advantage_is_the_reward_minus_the_mean_of_the_others(rewards_PK: list[list[float]]) -> None:
    torch.testing.assert_close(
        leave_one_out_advantages(torch.tensor(rewards_PK)), torch.tensor(naive(rewards_PK)), atol=1e-4, rtol=1e-4
    )


@given(rewards)
def test_advantages_of_a_prompt_sum_to_zero(rewards_PK: list[list[float]]) -> None:
    assert leave_one_out_advantages(torch.tensor(rewards_PK)).sum(1).abs().max().item() < 1e-3


def test_two_completions_have_plus_and_minus_the_difference_of_their_rewards() -> None:
    assert leave_one_out_advantages(torch.tensor([[3.0, 1.0], [-1.0, 4.0]])).tolist() == [[2.0, -2.0], [-5.0, 5.0]]


def test_a_prompt_does_not_move_the_advantages_of_another_nor_does_a_shift_its_own() -> None:
    rewards_PK = torch.tensor([[1.0, 2.0, 6.0], [0.0, 0.0, 3.0]])
    expected = leave_one_out_advantages(rewards_PK)
    torch.testing.assert_close(leave_one_out_advantages(rewards_PK + torch.tensor([[7.0], [-3.0]])), expected)
    torch.testing.assert_close(
        leave_one_out_advantages(torch.cat([rewards_PK[:1], rewards_PK[1:] * 9]))[0], expected[0]
    )


def test_one_completion_has_no_baseline() -> None:
    with pytest.raises(AssertionError, match="a baseline needs another completion"):
        leave_one_out_advantages(torch.zeros(3, 1))


SCORES_PK = torch.tensor([[2.0, 5.0, 3.0]])
KL_PK = torch.tensor([[10.0, 20.0, 0.0]])
TRUNCATED_PK = torch.tensor([[False, True, False]])


@pytest.mark.parametrize(
    ("truncated", "in_baseline", "rewards_PK", "advantages_PK"),
    [
        ("penalty", True, [[1.0, 0.0, 3.0]], [[-0.5, -2.0, 2.5]]),  # 2 - 0.1 * 10; 5 - 0.1 * 20 - 3; 3
        ("keep", True, [[1.0, 3.0, 3.0]], [[-2.0, 1.0, 1.0]]),
        # masked: in the baseline of the others, without a gradient of its own
        ("mask", True, [[1.0, 3.0, 3.0]], [[-2.0, 0.0, 1.0]]),
        # advantages of the scores 2, 2, 3: -0.5, -0.5, 1; then minus the KL costs 1, 2, 0
        ("penalty", False, [[1.0, 0.0, 3.0]], [[-1.5, -2.5, 1.0]]),
    ],
)
def test_a_reward_is_the_score_less_the_kl_cost_less_the_penalty_for_being_cut(
    truncated: str, in_baseline: bool, rewards_PK: list[list[float]], advantages_PK: list[list[float]]
) -> None:
    settings = RlooConfig.model_validate(
        {"truncated_completions": truncated, "truncated_penalty": 3.0, "kl_in_baseline": in_baseline}
    )
    advantages = advantages_of(SCORES_PK, KL_PK, TRUNCATED_PK, settings, kl_coefficient=0.1)
    torch.testing.assert_close(advantages.rewards_PK, torch.tensor(rewards_PK))
    torch.testing.assert_close(advantages.advantages_PK, torch.tensor(advantages_PK))


def test_a_completion_without_a_score_is_in_no_baseline_and_has_no_advantage() -> None:
    scores_PK = torch.tensor([[1.0, torch.nan, 4.0], [torch.nan, 7.0, torch.nan], [0.0, 3.0, 6.0]])
    advantages = advantages_of(
        scores_PK, torch.zeros(3, 3), torch.zeros(3, 3, dtype=torch.bool), RlooConfig(), kl_coefficient=0.1
    )
    expected_PK = torch.tensor([[-3.0, 0.0, 3.0], [0.0, 0.0, 0.0], [-4.5, 0.0, 4.5]])
    torch.testing.assert_close(advantages.advantages_PK, expected_PK)
    assert advantages.num_without_baseline == 1


@pytest.mark.parametrize(("kl_mean", "expected"), [(8.0, 0.1 * 1.02), (4.4, 0.1 * 1.01), (4.0, 0.1), (0.0, 0.1 * 0.98)])
def test_the_kl_coefficient_follows_the_kl_by_a_bounded_share(kl_mean: float, expected: float) -> None:
    assert next_kl_coefficient(0.1, kl_mean, target_kl=4.0, horizon_steps=10) == pytest.approx(expected)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_the_kl_estimators_have_the_kl_as_their_mean_or_nearly(estimator: str) -> None:
    """The mean is taken over the policy's distribution. k2 is biased in the third order of the difference."""
    policy, reference = (
        torch.tensor(logits, dtype=torch.float64).log_softmax(0) for logits in ([0.2, -0.1, 0.0], [0.0, 0.1, -0.1])
    )
    kl = (policy.exp() * (policy - reference)).sum()
    assert (policy.exp() * token_kl(policy, reference, estimator)).sum().item() == pytest.approx(
        kl.item(), rel=0.1 if estimator == "k2" else 1e-9
    )


def test_token_values_are_summed_within_their_completion_and_no_token_is_zero() -> None:
    owner_M = torch.tensor([0, 0, 2, 0, 2])
    assert sum_by_completion(torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]), owner_M, 4).tolist() == [7.0, 0.0, 8.0, 0.0]


def test_sequence_kl_is_the_sum_of_log_ratios_and_zero_between_equal_policies() -> None:
    policy_M, reference_M, owner_M = (
        torch.tensor([-1.0, -2.0, -0.5]),
        torch.tensor([-1.5, -2.5, -0.25]),
        torch.tensor([0, 0, 1]),
    )
    assert sequence_kl(policy_M, reference_M, owner_M, 2, estimator="k1").tolist() == [1.0, -0.25]
    assert sequence_kl(policy_M, policy_M, owner_M, 2, estimator="k1").tolist() == [0.0, 0.0]


def test_sums_carry_the_gradient_to_every_token() -> None:
    values_M = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    (sum_by_completion(values_M, torch.tensor([0, 1, 1]), 2) * torch.tensor([5.0, 7.0])).sum().backward()
    assert values_M.grad is not None
    assert values_M.grad.tolist() == [5.0, 7.0, 7.0]
