"""What one RLOO step reports. Pure. Shapes: P prompts, K completions per prompt."""

import statistics

import torch
from torch import Tensor

from rm_robust.records import PromptCompletions
from rm_robust.rloo.advantages import Advantages
from rm_robust.rloo.rewards import StepScores, score_metrics
from rm_robust.rloo.rollout import Measurement


def rollout_metrics(
    completions: list[PromptCompletions], scores: StepScores, measurements: list[Measurement], advantages: Advantages, *, kl_PK: Tensor
) -> dict[str, float]:
    """Scores (raw units), KL (nats a completion), entropy (nats a token), lengths (tokens) of one step's completions.

    Means leave out what has no score; `rloo/gold_…` are missing in a step that the judge does not score.
    """
    flat = [c for p in completions for c in p.completions]
    token_shares = [m.num_tokens for m in measurements]
    rewards_PK, advantages_PK = advantages.rewards_PK, advantages.advantages_PK
    first_PK = rewards_PK.nan_to_num(torch.inf).amin(1, keepdim=True)
    return score_metrics(scores) | {
        "rloo/reward_mean": float(rewards_PK.nanmean()),
        "rloo/constant_reward_fraction": float(((rewards_PK == first_PK) | rewards_PK.isnan()).all(1).float().mean()),
        "rloo/without_gradient_fraction": float((advantages_PK == 0).float().mean()),
        "rloo/num_without_baseline": advantages.num_without_baseline,
        "rloo/advantage_std": float(advantages_PK.std(correction=0)),
        "rloo/kl_mean": float(kl_PK.mean()),
        "rloo/entropy_mean": statistics.fmean([m.entropy_mean for m in measurements], token_shares),
        "rloo/sampler_gap_mean": statistics.fmean([m.sampler_gap_mean for m in measurements], token_shares),
        "rloo/sampler_gap_max": max(m.sampler_gap_max for m in measurements),
        "rloo/sampler_kl_mean": statistics.fmean([m.sampler_kl_mean for m in measurements], token_shares),
        "rloo/completion_tokens_mean": statistics.fmean(len(c.token_ids) for c in flat),
        "rloo/truncated_fraction": statistics.fmean(c.is_truncated for c in flat),
        "rloo/num_completions": len(flat),
    }
