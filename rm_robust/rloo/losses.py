"""Compute the policy loss: pure functions of three log-probabilities of every sampled token.

All three are at the sampling temperature, in nats:

    sampler   vLLM's when it sampled, under the policy version that it had then
    old       the trainer's at the start of the step's update
    new       the trainer's now, with gradient

Shapes: N completions, M tokens.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from rm_robust.config.rloo import RlooConfig
from rm_robust.rloo.advantages import sum_by_completion


@dataclass(frozen=True)
class PolicyLoss:
    """Loss terms and clipped shares of the completions of one batch."""

    terms_N: Tensor
    """Loss terms with gradient; the step's loss is their mean over all completions of all ranks."""
    clipped_N: Tensor
    """Share of each completion's ratios whose gradient is clipped away."""


def policy_loss(
    new_logprobs_M: Tensor,
    old_logprobs_M: Tensor,
    sampler_logprobs_M: Tensor,
    advantages_N: Tensor,
    completion_of_M: Tensor,
    settings: RlooConfig,
) -> PolicyLoss:
    """Return the terms w * max(-A r, -A clip(r, 1 - c, 1 + c)) of the clipped policy loss, one per completion.

    r is the ratio new / old of the whole completion (`ratio_level` "sequence"), or of each token, and then the term is
    the mean over the completion's tokens ("token"). w is the importance weight old / sampler. Schulman et al. 2017, Eq.
    7; on whole completions it is that of TRL's RLOOTrainer and of the paper's code.
    """
    num_completions = len(advantages_N)
    log_ratios, advantages = new_logprobs_M - old_logprobs_M, advantages_N[completion_of_M]
    if settings.ratio_level == "sequence":
        log_ratios, advantages = sum_by_completion(log_ratios, completion_of_M, num_completions), advantages_N
    ratios = log_ratios.exp()
    low, high = 1 - settings.clip_range, 1 + settings.clip_range
    terms = (-advantages * ratios).maximum(-advantages * ratios.clamp(low, high))
    clipped = (((ratios < low) & (advantages < 0)) | ((ratios > high) & (advantages > 0))).to(terms.dtype)
    terms = terms * importance_weights(old_logprobs_M, sampler_logprobs_M, completion_of_M, num_completions, settings)
    if settings.ratio_level == "token":
        lengths_N = sum_by_completion(torch.ones_like(terms), completion_of_M, num_completions)
        terms, clipped = (
            sum_by_completion(values, completion_of_M, num_completions) / lengths_N for values in (terms, clipped)
        )
    return PolicyLoss(terms, clipped)


def importance_weights(
    old_logprobs_M: Tensor,
    sampler_logprobs_M: Tensor,
    completion_of_M: Tensor,
    num_completions: int,
    settings: RlooConfig,
) -> Tensor:
    """Return the importance weight min(old / sampler, cap) of each ratio, without gradient.

    This is truncated importance sampling (Ionides 2008; Yao et al. 2025 for engine mismatch).
    """
    log_weights = (old_logprobs_M - sampler_logprobs_M).detach()
    if settings.importance_correction == "none":
        log_weights = torch.zeros_like(log_weights)
    if settings.importance_correction == "token":
        return log_weights.exp().clamp(max=settings.importance_cap)
    weights_N = (
        sum_by_completion(log_weights, completion_of_M, num_completions).exp().clamp(max=settings.importance_cap)
    )
    return weights_N if settings.ratio_level == "sequence" else weights_N[completion_of_M]
