"""Objectives of reward-model training: pure functions of the scores. `objective_value` is finite with finite gradients at any finite float32 score.

Shapes: B pairs. `chosen_scores_B[i]` and `rejected_scores_B[i]` belong to one pair. Per-pair losses are [B], penalties scalars.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from rm_robust.config.objectives import BsrScale, BsrScope, Objective

FLOAT32_MAX = torch.finfo(torch.float32).max
SUMS_OVER_PAIRS = (Objective.BRADLEY_TERRY, Objective.MARGIN, Objective.HINGE, Objective.BT_NORM, Objective.BT_DR)
"""Objectives in which no pair's gradient depends on another pair."""


@dataclass(frozen=True)
class ObjectiveSettings:
    """The objective and the constants of all of them, each of which reads its own; defaults and bounds: RewardModelConfig."""

    objective: Objective
    bsr_coefficient: float = 0.0
    bsr_scale: BsrScale = BsrScale.PAIRS
    bsr_scope: BsrScope = BsrScope.STEP
    bsr_micro_pairs: int = 1
    """Pairs of a block of BsrScope.MICRO."""
    norm_epsilon: float = 1e-6
    norm_temperature: float = 1.0
    centering_coefficient: float = 0.0


@dataclass(frozen=True)
class ObjectiveValue:
    """Loss of one optimiser step and its parts (nats; `batch_mean_score` in score units), with the gradient by score.

    `pair_loss`: the weighted mean over pairs; `penalty`: what BSR or centering adds to it, coefficient included.
    """

    loss: float
    pair_loss: float
    penalty: float
    effective_coefficient: float
    batch_mean_score: float
    gradient_B2: Tensor


def bradley_terry_losses(chosen_scores_B: Tensor, rejected_scores_B: Tensor) -> Tensor:
    """Negative log-likelihood that chosen beats rejected (nats). Bradley & Terry 1952; paper Eq. 3."""
    return -F.logsigmoid(chosen_scores_B - rejected_scores_B)


def margin_losses(chosen_scores_B: Tensor, rejected_scores_B: Tensor, margins_B: Tensor) -> Tensor:
    """Negative log-likelihood (nats) that chosen beats rejected by its margin. Llama 2 (Touvron et al. 2023), Eq. 2; TRL's `margin` column."""
    return -F.logsigmoid(chosen_scores_B - rejected_scores_B - margins_B)


def hinge_losses(chosen_scores_B: Tensor, rejected_scores_B: Tensor, margins_B: Tensor) -> Tensor:
    """max(0, margin - (chosen - rejected)), score units. Paper Eq. 30."""
    return F.relu(margins_B - (chosen_scores_B - rejected_scores_B))


def bt_norm_losses(chosen_scores_B: Tensor, rejected_scores_B: Tensor, *, epsilon: float, temperature: float) -> Tensor:
    """Bradley-Terry (nats) on the score difference over the length of (chosen, rejected). Paper Eq. 29, after LogitNorm (Wei et al. 2022).

    `epsilon`, inside the root, keeps the gradient finite at (0, 0), where the released code's is NaN; `temperature` divides the quotient.
    """
    length_B = (chosen_scores_B.square() + rejected_scores_B.square() + epsilon).sqrt()
    return -F.logsigmoid((chosen_scores_B - rejected_scores_B) / (length_B * temperature))


def bt_dr_losses(chosen_scores_B: Tensor, rejected_scores_B: Tensor) -> Tensor:
    """Bradley-Terry plus -log sigma(chosen) - log sigma(-rejected) (nats). Paper Eq. 31, after Eurus (Yuan et al. 2024)."""
    return (
        bradley_terry_losses(chosen_scores_B, rejected_scores_B)
        - F.logsigmoid(chosen_scores_B)
        - F.logsigmoid(-rejected_scores_B)
    )


def batch_sum_to_zero_penalty(chosen_scores_B: Tensor, rejected_scores_B: Tensor) -> Tensor:
    """Square of the mean of all 2B scores (score units squared). Paper Eq. 25, L_BSR."""
    return torch.cat([chosen_scores_B, rejected_scores_B]).mean().square()


def centering_penalty(chosen_scores_B: Tensor, rejected_scores_B: Tensor) -> Tensor:
    """Mean over pairs of (chosen + rejected)^2 (score units squared). TRL's `center_rewards_coefficient`; Eisenstein et al. 2023."""
    return (chosen_scores_B + rejected_scores_B).square().mean()


def objective_value(
    scores_B2: Tensor, settings: ObjectiveSettings, *, margins_B: Tensor | None = None, weights_B: Tensor | None = None
) -> ObjectiveValue:
    """The objective over a whole optimiser-step batch and its gradient with respect to every score.

    `scores_B2`: (chosen, rejected) of all pairs of all ranks and micro-batches; working from them makes loss and gradient the same for any
    number of ranks, micro-batches or packings. `margins_B` (default 0) are for Objective.MARGIN and HINGE. `weights_B` > 0 (default 1) weigh
    the pairs' losses, whose weighted mean is taken, and leave penalties alone. Computed in float64, because a square or a difference of finite
    float32 scores may overflow in float32; the gradient is float32.
    """
    leaf_B2 = scores_B2.detach().double().requires_grad_(True)
    chosen_B, rejected_B = leaf_B2.unbind(1)
    margins_B = torch.zeros_like(chosen_B) if margins_B is None else margins_B.double()
    weights_B = torch.ones_like(chosen_B) if weights_B is None else weights_B.double()
    pair_loss = (_pair_losses(settings)(chosen_B, rejected_B, margins_B) * weights_B).sum() / weights_B.sum()
    coefficient, penalty = _penalty(chosen_B, rejected_B, settings)
    loss = pair_loss + penalty
    (gradient_B2,) = torch.autograd.grad(loss, leaf_B2)
    return ObjectiveValue(
        loss=loss.item(),
        pair_loss=pair_loss.item(),
        penalty=penalty.item(),
        effective_coefficient=coefficient,
        batch_mean_score=leaf_B2.detach().mean().item(),
        gradient_B2=gradient_B2.clamp(-FLOAT32_MAX, FLOAT32_MAX).float(),
    )


def _pair_losses(settings: ObjectiveSettings) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    match settings.objective:
        case Objective.MARGIN:
            return margin_losses
        case Objective.HINGE:
            return hinge_losses
        case Objective.BT_NORM:
            epsilon, temperature = settings.norm_epsilon, settings.norm_temperature
            return lambda chosen_B, rejected_B, _: bt_norm_losses(
                chosen_B, rejected_B, epsilon=epsilon, temperature=temperature
            )
        case Objective.BT_DR:
            return lambda chosen_B, rejected_B, _: bt_dr_losses(chosen_B, rejected_B)
        case Objective.BRADLEY_TERRY | Objective.CENTERING | Objective.BATCH_SUM_TO_ZERO:
            return lambda chosen_B, rejected_B, _: bradley_terry_losses(chosen_B, rejected_B)


def _penalty(chosen_B: Tensor, rejected_B: Tensor, settings: ObjectiveSettings) -> tuple[float, Tensor]:
    """The effective coefficient and the term. BSR: paper Eq. 24; the factor of BsrScale.PAIRS is the released code's (reward_trainer.py, l. 318)."""
    if settings.objective is Objective.CENTERING:
        return settings.centering_coefficient, settings.centering_coefficient * centering_penalty(chosen_B, rejected_B)
    if settings.objective is not Objective.BATCH_SUM_TO_ZERO:
        return 0.0, torch.zeros_like(chosen_B).sum()
    pairs_in_scope = len(chosen_B) if settings.bsr_scope is BsrScope.STEP else settings.bsr_micro_pairs
    coefficient = settings.bsr_coefficient * (pairs_in_scope if settings.bsr_scale is BsrScale.PAIRS else 1)
    blocks = zip(chosen_B.split(pairs_in_scope), rejected_B.split(pairs_in_scope), strict=True)
    return coefficient, coefficient * torch.stack(
        [batch_sum_to_zero_penalty(chosen, rejected) for chosen, rejected in blocks]
    ).mean()
