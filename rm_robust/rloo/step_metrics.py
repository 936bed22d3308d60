"""What one RLOO step reports. Pure. Shapes: P prompts, K completions per prompt."""

import statistics

import torch
from torch import Tensor

from rm_robust.records import PromptCompletions
from rm_robust.rloo.rollout import Measurement, RolloutScores


def rollout_metrics(
    completions: list[PromptCompletions], scores: RolloutScores, measurements: list[Measurement], *, rewards_PK: Tensor, kl_PK: Tensor
) -> dict[str, float]:
    """Scores (raw units), KL (nats a completion), entropy (nats a token), lengths (tokens) of one step's completions."""
    flat = [c for p in completions for c in p.completions]
    proxy_PK, gold_PK = torch.tensor(scores.proxy), torch.tensor(scores.gold)
    token_shares = [m.num_tokens for m in measurements]
    return {
        "rloo/proxy_score_mean": float(proxy_PK.mean()),
        "rloo/proxy_score_std": float(proxy_PK.std(correction=0)),
        "rloo/gold_score_mean": float(gold_PK.mean()),
        "rloo/gold_score_std": float(gold_PK.std(correction=0)),
        "rloo/reward_mean": float(rewards_PK.mean()),
        "rloo/constant_reward_fraction": float((rewards_PK == rewards_PK[:, :1]).all(1).float().mean()),
        "rloo/kl_mean": float(kl_PK.mean()),
        "rloo/entropy_mean": statistics.fmean([m.entropy_mean for m in measurements], token_shares),
        "rloo/sampler_gap_mean": statistics.fmean([m.sampler_gap_mean for m in measurements], token_shares),
        "rloo/sampler_gap_max": max(m.sampler_gap_max for m in measurements),
        "rloo/completion_tokens_mean": statistics.fmean(len(c.token_ids) for c in flat),
        "rloo/truncated_fraction": statistics.fmean(c.is_truncated for c in flat),
        "rloo/num_completions": len(flat),
    }
