"""From the scores of several sources to the score that a step's rewards are made of. Pure. Shapes: P prompts, K completions per prompt.

A score that failed is NaN, and stays NaN through everything here: never 0, never a mean.
"""

import math
import statistics
from dataclasses import dataclass

import torch
from torch import Tensor


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
    weighted = [weight * torch.tensor(source_scores[name], dtype=torch.float64) for name, weight in weights.items() if weight != 0]
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


def score_metrics(scores: StepScores) -> dict[str, float]:
    """Mean and population deviation of each source's known raw scores, and what failed: scores of all sources, and the share of completions without
    a reward. A judge that was not asked has no metrics."""
    names = {name: f"rloo/reward/{name}" for name in scores.source_scores} | {"proxy": "rloo/proxy_score", "gold": "rloo/gold_score"}
    rows = scores.source_scores if scores.gold is None else scores.source_scores | {"gold": scores.gold}
    metrics: dict[str, float] = {}
    for name, own in rows.items():
        known = [score for row in own for score in row if not math.isnan(score)]
        metrics |= {f"{names[name]}_mean": statistics.fmean(known), f"{names[name]}_std": statistics.pstdev(known)}
    return metrics | {
        "rloo/num_failed_scores": sum(scores.num_failed.values()),
        "rloo/failed_score_fraction": float(scores.rewards_PK.isnan().double().mean()),
        "rloo/num_checkpoint_changes": scores.num_checkpoint_changes,
    }
