"""Agreement of scores with gold, as pure functions. Pairs are [chosen, rejected]; groups are K completions of one prompt."""

import math
from dataclasses import dataclass
from typing import Literal

from scipy.stats import kendalltau

Metric = Literal["accuracy", "kendall_tau_b"]


@dataclass(frozen=True)
class ScenarioResult:
    """One row of the four-scenario table. `num_undefined`: prompts left out because gold is constant there;
    `num_constant_scores`: prompts on which the model's scores are constant (tau counted as 0; a tied pair counts as wrong)."""

    metric: Metric
    value: float
    num_prompts: int
    num_undefined: int
    num_constant_scores: int


def pairwise_accuracy(scores: list[list[float]]) -> ScenarioResult:
    """Fraction of [chosen, rejected] pairs with chosen strictly above rejected; a tie is wrong. Raises ValueError without pairs."""
    if not scores:
        raise ValueError("Accuracy needs at least one pair, got none.")
    correct = sum(chosen > rejected for chosen, rejected in scores)
    ties = sum(chosen == rejected for chosen, rejected in scores)
    return ScenarioResult("accuracy", correct / len(scores), len(scores), 0, ties)


def mean_kendall_tau(scores: list[list[float]], gold_scores: list[list[float]]) -> ScenarioResult:
    """Mean over prompts of Kendall's tau-b (scipy) between scores and gold.

    A prompt with constant scores says nothing and counts as 0; a prompt with constant gold is excluded; both are counted. Raises ValueError
    when no prompt has a defined value.
    """
    taus: list[float] = []
    constant_scores = undefined = 0
    for own, gold in zip(scores, gold_scores, strict=True):
        if len(set(gold)) == 1:
            undefined += 1
        elif len(set(own)) == 1:
            constant_scores += 1
            taus.append(0.0)
        else:
            taus.append(float(kendalltau(own, gold, variant="b").statistic))
    if not taus:
        raise ValueError(f"Kendall's tau needs at least one prompt whose gold scores differ, got {undefined} with constant gold.")
    assert all(math.isfinite(tau) for tau in taus)
    return ScenarioResult("kendall_tau_b", sum(taus) / len(taus), len(taus) + undefined, undefined, constant_scores)
