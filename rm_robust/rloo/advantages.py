"""Rewards and leave-one-out advantages: pure functions. Shapes: P prompts, K completions per prompt, N = P*K prompt-major, M tokens."""

import torch
from torch import Tensor


def sequence_kl(policy_logprobs_M: Tensor, reference_logprobs_M: Tensor, completion_of_M: Tensor, num_completions: int) -> Tensor:
    """KL of each completion, summed over its tokens, [N] nats: the k1 estimator log pi - log pi_ref (Schulman 2020; the paper's code)."""
    return sum_by_completion(policy_logprobs_M - reference_logprobs_M, completion_of_M, num_completions)


def sum_by_completion(values_M: Tensor, completion_of_M: Tensor, num_completions: int) -> Tensor:
    """Token values summed within each completion, [N]."""
    return torch.zeros(num_completions, dtype=values_M.dtype, device=values_M.device).index_add(0, completion_of_M, values_M)


def rewards_of(scores_PK: Tensor, kl_PK: Tensor, is_truncated_PK: Tensor, *, kl_coefficient: float, truncated_penalty: float) -> Tensor:
    """Reward = proxy score - kl_coefficient * sequence KL - truncated_penalty where the completion was cut, [P, K]. Paper Eq. 15 and appendix A."""
    return scores_PK - kl_coefficient * kl_PK - truncated_penalty * is_truncated_PK.to(scores_PK.dtype)


def leave_one_out_advantages(rewards_PK: Tensor) -> Tensor:
    """Reward minus the mean reward of the prompt's other K - 1 completions, [P, K]. Ahmadian et al. 2024 (RLOO), Eq. 8; needs K >= 2."""
    num_completions = rewards_PK.shape[1]
    assert num_completions >= 2, "a baseline needs another completion"
    baseline_PK = (rewards_PK.sum(1, keepdim=True) - rewards_PK) / (num_completions - 1)
    return rewards_PK - baseline_PK
