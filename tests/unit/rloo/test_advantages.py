"""Leave-one-out advantages against a naive loop, and what a reward is made of."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rm_robust.rloo.advantages import leave_one_out_advantages, rewards_of, sequence_kl, sum_by_completion

rewards = st.integers(2, 6).flatmap(lambda k: st.lists(st.lists(st.floats(-50, 50, width=32), min_size=k, max_size=k), min_size=1, max_size=5))


def naive(rewards_PK: list[list[float]]) -> list[list[float]]:
    advantages = []
    for row in rewards_PK:
        others = [row[:k] + row[k + 1 :] for k in range(len(row))]
        advantages.append([own - sum(rest) / len(rest) for own, rest in zip(row, others, strict=True)])
    return advantages


@given(rewards)
def test_an_advantage_is_the_reward_minus_the_mean_of_the_others(rewards_PK: list[list[float]]) -> None:
    torch.testing.assert_close(leave_one_out_advantages(torch.tensor(rewards_PK)), torch.tensor(naive(rewards_PK)), atol=1e-4, rtol=1e-4)


@given(rewards)
def test_advantages_of_a_prompt_sum_to_zero(rewards_PK: list[list[float]]) -> None:
    assert leave_one_out_advantages(torch.tensor(rewards_PK)).sum(1).abs().max().item() < 1e-3


def test_two_completions_have_plus_and_minus_the_difference_of_their_rewards() -> None:
    assert leave_one_out_advantages(torch.tensor([[3.0, 1.0], [-1.0, 4.0]])).tolist() == [[2.0, -2.0], [-5.0, 5.0]]


def test_a_prompt_does_not_move_the_advantages_of_another_nor_does_a_shift_its_own() -> None:
    rewards_PK = torch.tensor([[1.0, 2.0, 6.0], [0.0, 0.0, 3.0]])
    expected = leave_one_out_advantages(rewards_PK)
    torch.testing.assert_close(leave_one_out_advantages(rewards_PK + torch.tensor([[7.0], [-3.0]])), expected)
    torch.testing.assert_close(leave_one_out_advantages(torch.cat([rewards_PK[:1], rewards_PK[1:] * 9]))[0], expected[0])


def test_one_completion_has_no_baseline() -> None:
    with pytest.raises(AssertionError, match="a baseline needs another completion"):
        leave_one_out_advantages(torch.zeros(3, 1))


def test_a_reward_is_the_score_less_the_kl_cost_less_the_penalty_for_being_cut() -> None:
    """2 - 0.05 * 10 = 1.5 and 2 - 0.05 * 20 - 3 = -2."""
    rewards_PK = rewards_of(torch.tensor([[2.0, 2.0]]), torch.tensor([[10.0, 20.0]]), torch.tensor([[False, True]]), kl_coefficient=0.05, truncated_penalty=3.0)
    assert rewards_PK.tolist() == [[1.5, -2.0]]


def test_token_values_are_summed_within_their_completion_and_no_token_is_zero() -> None:
    owner_M = torch.tensor([0, 0, 2, 0, 2])
    assert sum_by_completion(torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]), owner_M, 4).tolist() == [7.0, 0.0, 8.0, 0.0]


def test_sequence_kl_is_the_sum_of_log_ratios_and_zero_between_equal_policies() -> None:
    policy_M, reference_M, owner_M = torch.tensor([-1.0, -2.0, -0.5]), torch.tensor([-1.5, -2.5, -0.25]), torch.tensor([0, 0, 1])
    assert sequence_kl(policy_M, reference_M, owner_M, 2).tolist() == [1.0, -0.25]
    assert sequence_kl(policy_M, policy_M, owner_M, 2).tolist() == [0.0, 0.0]


def test_sums_carry_the_gradient_to_every_token() -> None:
    values_M = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    (sum_by_completion(values_M, torch.tensor([0, 1, 1]), 2) * torch.tensor([5.0, 7.0])).sum().backward()
    assert values_M.grad is not None
    assert values_M.grad.tolist() == [5.0, 7.0, 7.0]
