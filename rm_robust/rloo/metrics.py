"""Compute the metrics of one RLOO step. Pure functions. Shapes: P prompts, K completions per prompt."""

import math
import statistics

import torch
from torch import Tensor

from rm_robust.rloo.advantages import Advantages, StepScores
from rm_robust.rloo.rollout import Measurement, PromptCompletions


def rollout_metrics(
    completions: list[PromptCompletions],
    scores: StepScores,
    measurements: list[Measurement],
    advantages: Advantages,
    *,
    kl_PK: Tensor,
) -> dict[str, float]:
    """Return the metrics of one step's completions.

    Scores are in raw units, KL in nats per completion, entropy in nats per token, lengths in tokens. Means leave out
    what has no score. There is no `rloo/gold_…` metric in a step that the judge does not score.
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


def score_metrics(scores: StepScores) -> dict[str, float]:
    """Return mean and population deviation of each reward source's known raw scores, and the counts of failures.

    The failures are the failed scores of all sources together, and the fraction of completions without a reward, also
    where every source abstained. A judge that was not asked has no metrics, and a function that abstained from all
    completions has neither mean nor deviation.
    """
    prefixes = {name: f"rloo/reward/{name}" for name in scores.source_scores} | {
        "proxy": "rloo/proxy_score",
        "gold": "rloo/gold_score",
    }
    rows_by_name = scores.source_scores if scores.gold is None else scores.source_scores | {"gold": scores.gold}
    metrics: dict[str, float] = {}
    for name, rows in rows_by_name.items():
        known = [score for row in rows for score in row if not math.isnan(score)]
        prefix = prefixes[name]
        if known:  # a function may abstain from every completion of a step
            metrics |= {f"{prefix}_mean": statistics.fmean(known), f"{prefix}_std": statistics.pstdev(known)}
    metrics |= {f"{prefixes[name]}_num_abstained": number for name, number in scores.num_abstained.items()}
    return metrics | {
        "rloo/num_failed_scores": sum(scores.num_failed.values()),
        "rloo/failed_score_fraction": float(scores.rewards_PK.isnan().double().mean()),
        "rloo/num_checkpoint_changes": scores.num_checkpoint_changes,
    }
