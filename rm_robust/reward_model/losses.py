"""Objectives of reward-model training: pure functions of the scores, float32, safe at any finite score.

Shapes: B pairs. `chosen_scores_B[i]` and `rejected_scores_B[i]` belong to one pair. Every loss is a mean over pairs (scalar).
"""

from dataclasses import dataclass
from enum import StrEnum

import torch
import torch.nn.functional as F
from torch import Tensor


class Objective(StrEnum):
    """What a reward model is trained to minimise."""

    BRADLEY_TERRY = "bt"
    BATCH_SUM_TO_ZERO = "bsr"


class BsrScale(StrEnum):
    """`pairs`: coefficient x pairs in scope, as the released code; `none`: the paper's formula as printed."""

    PAIRS = "pairs"
    NONE = "none"


@dataclass(frozen=True)
class ObjectiveValue:
    """Loss of one optimiser step and its parts (nats; `batch_mean_score` in score units), with the gradient by score."""

    loss: float
    bradley_terry: float
    bsr_term: float
    effective_bsr_coefficient: float
    batch_mean_score: float
    gradient_B2: Tensor


def bradley_terry_loss(chosen_scores_B: Tensor, rejected_scores_B: Tensor) -> Tensor:
    """Mean negative log-likelihood that chosen beats rejected (scalar, nats). Bradley & Terry 1952; paper Eq. 3."""
    return -F.logsigmoid(chosen_scores_B - rejected_scores_B).mean()


def batch_sum_to_zero_penalty(chosen_scores_B: Tensor, rejected_scores_B: Tensor) -> Tensor:
    """Square of the mean of all 2B scores (scalar, score units squared). Paper Eq. 25, L_BSR."""
    return torch.cat([chosen_scores_B, rejected_scores_B]).mean().square()


def objective_value(scores_B2: Tensor, *, objective: Objective, bsr_coefficient: float, bsr_scale: BsrScale) -> ObjectiveValue:
    """The objective over a whole optimiser-step batch and its gradient with respect to every score.

    `scores_B2`: (chosen, rejected) of all pairs of all ranks and micro-batches. Working from the scores makes loss and gradient the same for
    any number of ranks, micro-batches or packings. Paper Eq. 24-25; the factor of `bsr_scale = pairs` is the released code's (reward_trainer.py, l. 318).
    """
    leaf_B2 = scores_B2.detach().float().requires_grad_(True)
    chosen_B, rejected_B = leaf_B2.unbind(1)
    bradley_terry = bradley_terry_loss(chosen_B, rejected_B)
    coefficient = 0.0
    if objective is Objective.BATCH_SUM_TO_ZERO:
        coefficient = bsr_coefficient * (len(leaf_B2) if bsr_scale is BsrScale.PAIRS else 1)
    bsr_term = coefficient * batch_sum_to_zero_penalty(chosen_B, rejected_B)
    loss = bradley_terry + bsr_term
    (gradient_B2,) = torch.autograd.grad(loss, leaf_B2)
    return ObjectiveValue(
        loss=loss.item(),
        bradley_terry=bradley_terry.item(),
        bsr_term=bsr_term.item(),
        effective_bsr_coefficient=coefficient,
        batch_mean_score=leaf_B2.detach().mean().item(),
        gradient_B2=gradient_B2,
    )
