"""Agreement of scores with gold scores, and figures of their distribution, as pure functions.

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
    """One row of the four-scenario table.

    `num_undefined`: prompts that are left out because their gold scores are constant. `num_constant_scores`: prompts on
    which the model's scores are constant (tau counts as 0; a tied pair counts as wrong).
    """

    metric: Metric
    value: float
    num_prompts: int
    num_undefined: int
    num_constant_scores: int


def pairwise_accuracy(scores: list[list[float]]) -> ScenarioResult:
    """Return the fraction of [chosen, rejected] pairs with chosen strictly above rejected; a tie is wrong.

    Raises ValueError without pairs.
    """
    if not scores:
        raise ValueError("Accuracy needs at least one pair, got none.")
    correct = sum(chosen > rejected for chosen, rejected in scores)
    ties = sum(chosen == rejected for chosen, rejected in scores)
    return ScenarioResult("accuracy", correct / len(scores), len(scores), 0, ties)


def mean_kendall_tau(scores: list[list[float]], gold_scores: list[list[float]]) -> ScenarioResult:
    """Return the mean over prompts of Kendall's tau-b (scipy) between scores and gold scores.

    A prompt with constant scores says nothing and counts as 0. A prompt with constant gold scores is excluded. Both
    kinds are counted. Raises ValueError when no prompt has a defined value.
    """
    taus: list[float] = []
    constant_scores = undefined = 0
    for model_scores, gold in zip(scores, gold_scores, strict=True):
        if len(set(gold)) == 1:
            undefined += 1
        else:
            constant_scores += len(set(model_scores)) == 1
            taus.append(kendall_tau_b(model_scores, gold))
    if not taus:
        raise ValueError(
            f"Kendall's tau needs at least one prompt whose gold scores differ, got {undefined} with constant gold."
        )
    assert all(math.isfinite(tau) for tau in taus)
    return ScenarioResult("kendall_tau_b", sum(taus) / len(taus), len(taus) + undefined, undefined, constant_scores)


def kendall_tau_b(scores: list[float], gold_scores: list[float]) -> float:
    """Return Kendall's tau-b (scipy) of one prompt's completions, whose gold scores must differ.

    Constant scores say nothing and give 0.
    """
    return 0.0 if len(set(scores)) == 1 else float(kendalltau(scores, gold_scores, variant="b").statistic)


def ordered_alike(scores: list[float], gold_scores: list[float]) -> list[bool]:
    """Return whether the scores order each pair of completions strictly as gold does, for gold scores that differ."""
    return [scores[better] > scores[worse] for better, worse in _ranked(gold_scores)]


def squared_errors(scores: list[float], gold_scores: list[float]) -> list[float]:
    """Return the terms of the Brier score (Brier 1950): (sigmoid(difference) - 1)^2 of each pair with different gold.

    The difference is the score of the better completion minus that of the worse one.
    """
    differences = [scores[better] - scores[worse] for better, worse in _ranked(gold_scores)]
    return [(1 / (1 + math.exp(min(difference, 700.0)))) ** 2 for difference in differences]


def _ranked(gold_scores: list[float]) -> list[tuple[int, int]]:
    """Return (better, worse) for every pair of completions whose gold scores differ."""
    return [(i, j) for i in range(len(gold_scores)) for j in range(len(gold_scores)) if gold_scores[i] > gold_scores[j]]


def skewness(values_N: Tensor) -> float:
    """Return the third standardised moment (population); 0 for constant values, which lean to no side."""
    centred_N = values_N.double() - values_N.double().mean()
    deviation = centred_N.square().mean().sqrt()
    return float((centred_N / deviation).pow(3).mean()) if deviation > 0 else 0.0


def correlation(first_N: Tensor, second_N: Tensor) -> float:
    """Return Pearson's correlation; 0 when either input is constant, because it then says nothing about the other."""
    a_N, b_N = (x.double() - x.double().mean() for x in (first_N, second_N))
    scale = a_N.norm() * b_N.norm()
    return float((a_N * b_N).sum() / scale) if scale > 0 else 0.0


def effective_rank(hidden_NH: Tensor) -> float:
    """Return exp of the entropy of the normalised singular values, between 1 and min(N, H).

    Roy & Vetterli 2007; paper Eq. 32.
    """
    singular_Q = torch.linalg.svdvals(hidden_NH.double())
    p_Q = singular_Q / singular_Q.sum()
    return float(torch.exp(torch.special.entr(p_Q).sum()))
