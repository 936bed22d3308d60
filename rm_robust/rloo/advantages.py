"""Turn the scores of the reward sources into rewards, KL costs and leave-one-out advantages. Pure functions of tensors.

Shapes: S reward sources, P prompts, K completions per prompt, N = P*K completions, M tokens. A failed score is NaN and
stays NaN in every function here: it never becomes 0 or a mean.
"""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rm_robust.config.rloo import RlooConfig

MAX_KL_ERROR = 0.2
"""Bound on the relative error between KL and target that `next_kl_coefficient` reacts to."""


@dataclass(frozen=True)
class StepScores:
    """Raw scores of one step's completions from every reward source and the gold judge; NaN where a score failed."""

    source_scores: dict[str, list[list[float]]]
    """Scores [P][K] of the proxy and of every other reward source, by the name of the source."""
    gold: list[list[float]] | None
    """Scores [P][K] of the gold judge; None when it was not asked."""
    rewards_PK: Tensor
    """The `weighted_scores` of `source_scores`, [P, K] float32."""
    num_failed: dict[str, int]
    """Number of completions without a score, for every source that was asked and for the gold judge."""
    checkpoints: dict[str, str]
    """The checkpoint that each served source and the gold judge scored with last; functions have none."""
    num_checkpoint_changes: int
    """Number of replies that name another checkpoint than the reply before from the same source."""
    num_abstained: dict[str, int] = field(default_factory=dict)
    """Number of completions from which a reward function abstained, for every function that did. Their score is NaN."""

    def of_completion(self, p: int, k: int) -> dict[str, float | None]:
        """Return the scores of one completion as `<source>_score`; None where one failed or the judge was not asked."""
        rows_by_name = self.source_scores if self.gold is None else self.source_scores | {"gold": self.gold}
        scores = {name: rows[p][k] for name, rows in rows_by_name.items()}
        known = {f"{name}_score": None if math.isnan(score) else score for name, score in scores.items()}
        return {"gold_score": None} | known


def weighted_scores(
    source_scores: dict[str, list[list[float]]],
    weights: dict[str, float],
    *,
    abstained: dict[str, list[list[bool]]] | None = None,
) -> Tensor:
    """Return the sum of weight * score over the reward sources, [P, K] float32.

    It is a sum and not a mean: a source that abstained (`abstained`, [P][K] for each source that did) adds nothing, and
    the weights of the others stay as they are. The sum is NaN where a source with a weight other than 0 failed, and
    where all of them abstained. TRL's reward_weights are the same except for failed scores: TRL 1.16 leaves them out of
    the sum (nansum), which makes the rewards of a prompt incomparable.
    """
    names = [name for name, weight in weights.items() if weight != 0]
    assert names, "every weight is 0"
    scores_SPK = torch.stack([weights[name] * torch.tensor(source_scores[name], dtype=torch.float64) for name in names])
    abstained_SPK = torch.zeros_like(scores_SPK, dtype=torch.bool)
    for number, name in enumerate(names):
        if abstained is not None and name in abstained:
            abstained_SPK[number] = torch.tensor(abstained[name])
    rewards_PK = scores_SPK.masked_fill(abstained_SPK, 0.0).sum(0).masked_fill(abstained_SPK.all(0), torch.nan)
    return rewards_PK.float()


def normalised_scores(scores_PK: Tensor) -> Tensor:
    """Return the scores minus their mean, divided by their population standard deviation, [P, K].

    Mean and deviation are those of the step's known scores; equal scores become 0. Zheng et al. 2023 (arXiv 2307.04964,
    reward normalization and clipping), with the statistics of the step.
    """
    known = scores_PK[~scores_PK.isnan()].double()
    if not len(known) or known.min() == known.max():
        return scores_PK - scores_PK  # NaN stays NaN; the deviation would be rounding error, so do not divide by it
    return ((scores_PK.double() - known.mean()) / known.std(correction=0)).to(scores_PK.dtype)


def shaped_scores(scores_PK: Tensor, *, normalise: bool, clip_range: tuple[float, float] | None) -> Tensor:
    """Return the scores, normalised if `normalise`, then clamped to `clip_range`, [P, K]. KL and baseline come later.

    The clamping is TRL 1.16's reward_clip_range.
    """
    if normalise:
        scores_PK = normalised_scores(scores_PK)
    return scores_PK if clip_range is None else scores_PK.clamp(*clip_range)


def token_kl(policy_logprobs_M: Tensor, reference_logprobs_M: Tensor, estimator: str) -> Tensor:
    """Estimate KL(policy || reference) at each token that the policy sampled, [M] nats.

    Schulman 2020, "Approximating KL divergence". With d = log policy - log reference: `k1` is d (unbiased; the paper's
    code), `k2` is d^2 / 2, `k3` is exp(-d) - 1 + d (unbiased, never negative).
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
    """Return the KL of each completion, [N] nats: the sum of the estimates of its tokens."""
    return sum_by_completion(
        token_kl(policy_logprobs_M, reference_logprobs_M, estimator), completion_of_M, num_completions
    )


def sum_by_completion(values_M: Tensor, completion_of_M: Tensor, num_completions: int) -> Tensor:
    """Return the sum of the token values of each completion, [N]; completion_of_M has each token's completion index."""
    return torch.zeros(num_completions, dtype=values_M.dtype, device=values_M.device).index_add(
        0, completion_of_M, values_M
    )


@dataclass(frozen=True)
class Advantages:
    """Rewards and advantages of one step.

    A completion whose score is missing (NaN) has the reward NaN and the advantage 0, and is in no baseline.
    """

    rewards_PK: Tensor
    advantages_PK: Tensor
    num_without_baseline: int
    """Number of completions that are the only scored one of their prompt; their advantage is 0."""


def advantages_of(
    scores_PK: Tensor, kl_PK: Tensor, is_truncated_PK: Tensor, settings: RlooConfig, *, kl_coefficient: float
) -> Advantages:
    """Return the rewards, score - truncation penalty - beta * KL, and their leave-one-out advantages.

    Paper Eq. 15 and appendix A; TRL's RLOOTrainer. When `kl_in_baseline` is off, the advantage is that of the reward
    without KL, and beta * KL is subtracted from it afterwards. Completions that are masked or have no baseline get the
    advantage 0.
    """
    without_kl_PK = scores_PK
    if settings.truncated_completions == "penalty":
        without_kl_PK = without_kl_PK - settings.truncated_penalty * is_truncated_PK.to(scores_PK.dtype)
    rewards_PK = without_kl_PK - kl_coefficient * kl_PK
    kl_afterwards_PK = torch.zeros_like(kl_PK) if settings.kl_in_baseline else kl_coefficient * kl_PK
    advantages_PK = (
        leave_one_out_advantages(rewards_PK if settings.kl_in_baseline else without_kl_PK) - kl_afterwards_PK
    )
    has_score_PK = ~scores_PK.isnan()
    is_only_score_PK = has_score_PK & (has_score_PK.sum(1, keepdim=True) < 2)
    has_gradient_PK = has_score_PK & ~is_only_score_PK
    if settings.truncated_completions == "mask":
        has_gradient_PK = has_gradient_PK & ~is_truncated_PK
    return Advantages(rewards_PK, torch.where(has_gradient_PK, advantages_PK, 0.0), int(is_only_score_PK.sum()))


def leave_one_out_advantages(rewards_PK: Tensor) -> Tensor:
    """Return each reward minus the mean reward of the prompt's other completions, [P, K]; needs K >= 2.

    Ahmadian et al. 2024 (RLOO), Eq. 8. A NaN reward is in no baseline and gives NaN; the only reward of a prompt gives
    NaN too.
    """
    assert rewards_PK.shape[1] >= 2, "a baseline needs another completion"
    num_others_PK = (~rewards_PK.isnan()).sum(1, keepdim=True) - 1
    return rewards_PK - (rewards_PK.nansum(1, keepdim=True) - rewards_PK) / torch.where(
        num_others_PK > 0, num_others_PK, torch.nan
    )


def next_kl_coefficient(kl_coefficient: float, kl_mean: float, *, target_kl: float, horizon_steps: float) -> float:
    """Return the KL coefficient of the next step, which is higher after a KL above the target.

    Ziegler et al. 2019, section 2.2, counted in steps instead of samples.
    """
    error = min(max(kl_mean / target_kl - 1, -MAX_KL_ERROR), MAX_KL_ERROR)
    return kl_coefficient * (1 + error / horizon_steps)
