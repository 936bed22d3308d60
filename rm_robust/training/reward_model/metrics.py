"""Agreement of scores with gold, and what their distribution looks like, as pure functions.

Pairs are [chosen, rejected]; groups are K completions of one prompt. Shapes: N scores, H hidden.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from scipy.stats import kendalltau
from torch import Tensor

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
        else:
            constant_scores += len(set(own)) == 1
            taus.append(kendall_tau_b(own, gold))
    if not taus:
        raise ValueError(
            f"Kendall's tau needs at least one prompt whose gold scores differ, got {undefined} with constant gold."
        )
    assert all(math.isfinite(tau) for tau in taus)
    return ScenarioResult("kendall_tau_b", sum(taus) / len(taus), len(taus) + undefined, undefined, constant_scores)


def kendall_tau_b(scores: list[float], gold_scores: list[float]) -> float:
    """Kendall's tau-b (scipy) of one prompt's completions, whose gold scores must differ; constant scores say nothing and have 0."""
    return 0.0 if len(set(scores)) == 1 else float(kendalltau(scores, gold_scores, variant="b").statistic)


def ordered_alike(scores: list[float], gold_scores: list[float]) -> list[bool]:
    """For every pair of completions whose gold scores differ: whether the scores order it strictly the same way."""
    return [scores[better] > scores[worse] for better, worse in _ranked(gold_scores)]


def squared_errors(scores: list[float], gold_scores: list[float]) -> list[float]:
    """(sigmoid(difference) - 1)^2 of every pair whose gold scores differ, better minus worse: the Brier score's terms. Brier 1950."""
    differences = [scores[better] - scores[worse] for better, worse in _ranked(gold_scores)]
    return [(1 / (1 + math.exp(min(difference, 700.0)))) ** 2 for difference in differences]


def _ranked(gold_scores: list[float]) -> list[tuple[int, int]]:
    """(better, worse) of every pair of completions whose gold scores differ."""
    return [(i, j) for i in range(len(gold_scores)) for j in range(len(gold_scores)) if gold_scores[i] > gold_scores[j]]


def skewness(values_N: Tensor) -> float:
    """Third standardised moment (population); 0 for constant values, which have no side."""
    centred_N = values_N.double() - values_N.double().mean()
    deviation = centred_N.square().mean().sqrt()
    return float((centred_N / deviation).pow(3).mean()) if deviation > 0 else 0.0


def correlation(first_N: Tensor, second_N: Tensor) -> float:
    """Pearson's; 0 when either is constant, which says nothing of the other."""
    a_N, b_N = (x.double() - x.double().mean() for x in (first_N, second_N))
    scale = a_N.norm() * b_N.norm()
    return float((a_N * b_N).sum() / scale) if scale > 0 else 0.0


def effective_rank(hidden_NH: Tensor) -> float:
    """exp of the entropy of the normalised singular values, between 1 and min(N, H). Roy & Vetterli 2007; paper Eq. 32."""
    singular_Q = torch.linalg.svdvals(hidden_NH.double())
    p_Q = singular_Q / singular_Q.sum()
    return float(torch.exp(torch.special.entr(p_Q).sum()))
