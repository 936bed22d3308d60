"""From the scores of several sources to rewards, KL costs and leave-one-out advantages. Pure.

Shapes: P prompts, K completions per prompt, M tokens. A score that failed is NaN, and stays NaN through everything here: never 0, never a mean.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from rm_robust.config.rloo import RlooConfig

MAX_KL_ERROR = 0.2


@dataclass(frozen=True)
class StepScores:
    """What the reward sources said of one step's completions. Raw scores, NaN where one failed."""

    source_scores: dict[str, list[list[float]]]
    """[P][K] of the proxy and of every reward source, by name."""
    gold: list[list[float]] | None
    """[P][K]; None: the judge was not asked."""
    rewards_PK: Tensor
    """weighted_scores of source_scores, float32."""
    num_failed: dict[str, int]
    """Completions without a score, of every source that was asked, gold too."""
    checkpoints: dict[str, str]
    """What each served source scored with last, gold too; functions have none."""
    num_checkpoint_changes: int
    """How often a source came back with another checkpoint than before."""

    def of_completion(self, p: int, k: int) -> dict[str, float | None]:
        """`<source>_score` of one completion; None where it failed, and of a judge that was not asked."""
        rows = self.source_scores if self.gold is None else self.source_scores | {"gold": self.gold}
        known = {f"{name}_score": None if math.isnan(own[p][k]) else own[p][k] for name, own in rows.items()}
        return {"gold_score": None} | known


def weighted_scores(source_scores: dict[str, list[list[float]]], weights: dict[str, float]) -> Tensor:
    """Sum of weight * score over the sources, [P, K] float32; NaN where a source of a weight other than 0 has none.

    TRL's reward_weights, but for what failed: TRL 1.16 sums the rest (nansum), which is another reward than that of its siblings.
    """
    weighted = [
        weight * torch.tensor(source_scores[name], dtype=torch.float64)
        for name, weight in weights.items()
        if weight != 0
    ]
    assert weighted, "every weight is 0"
    return torch.stack(weighted).sum(0).float()


def normalised_scores(scores_PK: Tensor) -> Tensor:
    """Scores minus their mean, over their population standard deviation, both of the step's known scores. Equal scores become 0.

    Zheng et al. 2023 (arXiv 2307.04964, reward normalization and clipping), with the statistics of the step.
    """
    known_M = scores_PK[~scores_PK.isnan()].double()
    if not len(known_M) or known_M.min() == known_M.max():
        return scores_PK - scores_PK  # NaN stays; a deviation that is rounding error must not be divided by
    return ((scores_PK.double() - known_M.mean()) / known_M.std(correction=0)).to(scores_PK.dtype)


def shaped_scores(scores_PK: Tensor, *, normalise: bool, clip_range: tuple[float, float] | None) -> Tensor:
    """normalised_scores if so asked, then clamped to `clip_range`, before KL and baseline (TRL 1.16's reward_clip_range), [P, K]."""
    if normalise:
        scores_PK = normalised_scores(scores_PK)
    return scores_PK if clip_range is None else scores_PK.clamp(*clip_range)


def token_kl(policy_logprobs_M: Tensor, reference_logprobs_M: Tensor, estimator: str) -> Tensor:
    """KL(policy || reference) estimated at each token that the policy sampled, [M] nats (Schulman 2020, "Approximating KL divergence").

    With d = log policy - log reference: `k1` d (unbiased; the paper's code), `k2` d^2 / 2, `k3` exp(-d) - 1 + d (unbiased, never negative).
    """
    difference_M = policy_logprobs_M - reference_logprobs_M
    if estimator == "k1":
        return difference_M
    if estimator == "k2":
        return difference_M.square() / 2
    assert estimator == "k3", estimator
    return torch.expm1(-difference_M) + difference_M


def sequence_kl(
    policy_logprobs_M: Tensor,
    reference_logprobs_M: Tensor,
    completion_of_M: Tensor,
    num_completions: int,
    *,
    estimator: str,
) -> Tensor:
    """KL of each completion, [N] nats: the estimates of its tokens, summed."""
    return sum_by_completion(
        token_kl(policy_logprobs_M, reference_logprobs_M, estimator), completion_of_M, num_completions
    )


def sum_by_completion(values_M: Tensor, completion_of_M: Tensor, num_completions: int) -> Tensor:
    """Token values summed within each completion, [N]."""
    return torch.zeros(num_completions, dtype=values_M.dtype, device=values_M.device).index_add(
        0, completion_of_M, values_M
    )


@dataclass(frozen=True)
class Advantages:
    """Of one step. A completion whose score is missing (NaN) has the reward NaN and the advantage 0, and is in no baseline."""

    rewards_PK: Tensor
    advantages_PK: Tensor
    num_without_baseline: int
    """Completions that have a score while no other completion of their prompt does: advantage 0."""


def advantages_of(
    scores_PK: Tensor, kl_PK: Tensor, is_truncated_PK: Tensor, settings: RlooConfig, *, kl_coefficient: float
) -> Advantages:
    """Reward = score - penalty of truncation - beta * KL, its leave-one-out advantage, and what masks it. Paper Eq. 15 and appendix A; TRL's RLOOTrainer.

    With `kl_in_baseline` off, beta * KL is subtracted from the advantage of the bare score instead.
    """
    rewards_PK = scores_PK
    if settings.truncated_completions == "penalty":
        rewards_PK = rewards_PK - settings.truncated_penalty * is_truncated_PK.to(scores_PK.dtype)
    penalised_PK = rewards_PK - kl_coefficient * kl_PK
    kl_afterwards_PK = torch.zeros_like(kl_PK) if settings.kl_in_baseline else kl_coefficient * kl_PK
    advantages_PK = leave_one_out_advantages(penalised_PK if settings.kl_in_baseline else rewards_PK) - kl_afterwards_PK
    has_score_PK = ~scores_PK.isnan()
    alone_PK = has_score_PK & (has_score_PK.sum(1, keepdim=True) < 2)
    has_gradient_PK = has_score_PK & ~alone_PK
    if settings.truncated_completions == "mask":
        has_gradient_PK = has_gradient_PK & ~is_truncated_PK
    return Advantages(penalised_PK, torch.where(has_gradient_PK, advantages_PK, 0.0), int(alone_PK.sum()))


def leave_one_out_advantages(rewards_PK: Tensor) -> Tensor:
    """Reward minus the mean reward of the prompt's other completions, [P, K]. Ahmadian et al. 2024 (RLOO), Eq. 8; needs K >= 2.

    NaN rewards are in no baseline and give NaN; so does a reward without another one.
    """
    assert rewards_PK.shape[1] >= 2, "a baseline needs another completion"
    num_others_PK = (~rewards_PK.isnan()).sum(1, keepdim=True) - 1
    return rewards_PK - (rewards_PK.nansum(1, keepdim=True) - rewards_PK) / torch.where(
        num_others_PK > 0, num_others_PK, torch.nan
    )


def next_kl_coefficient(kl_coefficient: float, kl_mean: float, *, target_kl: float, horizon_steps: float) -> float:
    """The coefficient of the next step: higher after a KL above the target. Ziegler et al. 2019, section 2.2, in steps instead of samples."""
    error = min(max(kl_mean / target_kl - 1, -MAX_KL_ERROR), MAX_KL_ERROR)
    return kl_coefficient * (1 + error / horizon_steps)
