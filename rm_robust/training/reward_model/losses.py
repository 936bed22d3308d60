"""Objectives of reward-model training: pure functions of the scores.

`objective_value` and its gradient are finite at any finite float32 score.

Shapes: B pairs. `chosen_scores_B[i]` and `rejected_scores_B[i]` belong to one pair. Per-pair losses are [B], and
penalties are scalars.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from rm_robust.config.objectives import BsrScale, BsrScope, Objective

FLOAT32_MAX = torch.finfo(torch.float32).max
SUMS_OVER_PAIRS = (Objective.BRADLEY_TERRY, Objective.MARGIN, Objective.HINGE, Objective.BT_NORM, Objective.BT_DR)
"""Objectives in which no pair's gradient depends on another pair."""


class ObjectiveSettings(Protocol):
    """The objective and the constants of all objectives, each of which reads its own.

    RewardModelConfig has these fields, with their defaults, bounds and meanings.
    """

    @property
    def objective(self) -> Objective: ...

    @property
    def bsr_coefficient(self) -> float: ...

    @property
    def bsr_scale(self) -> BsrScale: ...

    @property
    def bsr_scope(self) -> BsrScope: ...

    @property
    def bsr_micro_pairs(self) -> int | None:
        """Pairs of a block of BsrScope.MICRO; other scopes do not read it."""

    @property
    def norm_epsilon(self) -> float: ...

    @property
    def norm_temperature(self) -> float: ...

    @property
    def centering_coefficient(self) -> float: ...


@dataclass(frozen=True)
class ObjectiveValue:
    """The loss of one optimiser step, its parts and its gradient by score.

    Losses are in nats, `batch_mean_score` in score units. `pair_loss` is the weighted mean over pairs. `penalty` is
    what BSR or centering adds to it, coefficient included.
    """

    loss: float
    pair_loss: float
    penalty: float
    effective_coefficient: float
    batch_mean_score: float
    gradient_B2: Tensor


def bradley_terry_losses(chosen_scores_B: Tensor, rejected_scores_B: Tensor) -> Tensor:
    """Return the negative log-likelihood that chosen beats rejected (nats). Bradley & Terry 1952; paper Eq. 3."""
    return -F.logsigmoid(chosen_scores_B - rejected_scores_B)


def margin_losses(chosen_scores_B: Tensor, rejected_scores_B: Tensor, margins_B: Tensor) -> Tensor:
    """Return the negative log-likelihood (nats) that chosen beats rejected by its margin.

    Llama 2 (Touvron et al. 2023), Eq. 2; TRL's `margin` column.
    """
    return -F.logsigmoid(chosen_scores_B - rejected_scores_B - margins_B)


def hinge_losses(chosen_scores_B: Tensor, rejected_scores_B: Tensor, margins_B: Tensor) -> Tensor:
    """Return max(0, margin - (chosen - rejected)), in score units. Paper Eq. 30."""
    return F.relu(margins_B - (chosen_scores_B - rejected_scores_B))


def bt_norm_losses(chosen_scores_B: Tensor, rejected_scores_B: Tensor, *, epsilon: float, temperature: float) -> Tensor:
    """Return Bradley-Terry losses (nats) on the score difference divided by the length of (chosen, rejected).

    Paper Eq. 29, after LogitNorm (Wei et al. 2022). `epsilon`, inside the root, keeps the gradient finite at (0, 0),
    where the gradient of the released code is NaN. `temperature` divides the quotient.
    """
    length_B = (chosen_scores_B.square() + rejected_scores_B.square() + epsilon).sqrt()
    return -F.logsigmoid((chosen_scores_B - rejected_scores_B) / (length_B * temperature))


def bt_dr_losses(chosen_scores_B: Tensor, rejected_scores_B: Tensor) -> Tensor:
    """Return Bradley-Terry losses plus -log sigma(chosen) - log sigma(-rejected) (nats).

    Paper Eq. 31, after Eurus (Yuan et al. 2024).
    """
    return (
        bradley_terry_losses(chosen_scores_B, rejected_scores_B)
        - F.logsigmoid(chosen_scores_B)
        - F.logsigmoid(-rejected_scores_B)
    )


def batch_sum_to_zero_penalty(chosen_scores_B: Tensor, rejected_scores_B: Tensor) -> Tensor:
    """Return the square of the mean of all 2B scores (score units squared). Paper Eq. 25, L_BSR."""
    return torch.cat([chosen_scores_B, rejected_scores_B]).mean().square()


def centering_penalty(chosen_scores_B: Tensor, rejected_scores_B: Tensor) -> Tensor:
    """Return the mean over pairs of (chosen + rejected)^2 (score units squared).

    TRL's `center_rewards_coefficient`; Eisenstein et al. 2023.
    """
    return (chosen_scores_B + rejected_scores_B).square().mean()


def objective_value(
    scores_B2: Tensor, settings: ObjectiveSettings, *, margins_B: Tensor | None = None, weights_B: Tensor | None = None
) -> ObjectiveValue:
    """Return the objective over a whole optimiser-step batch and its gradient with respect to every score.

    `scores_B2` are (chosen, rejected) of all pairs of all ranks and micro-batches, so loss and gradient are the same
    for any number of ranks, micro-batches or packings. `margins_B` (default 0) are for Objective.MARGIN and HINGE.
    `weights_B` > 0 (default 1) weigh the losses of the pairs, whose weighted mean is taken; penalties ignore them.
    The computation is in float64, because a square or a difference of finite float32 scores may overflow in float32.
    The gradient is float32.
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
    """Return the effective coefficient and the penalty.

    BSR: paper Eq. 24. The factor of BsrScale.PAIRS is that of the released code (reward_trainer.py, l. 318).
    """
    if settings.objective is Objective.CENTERING:
        return settings.centering_coefficient, settings.centering_coefficient * centering_penalty(chosen_B, rejected_B)
    if settings.objective is not Objective.BATCH_SUM_TO_ZERO:
        return 0.0, torch.zeros_like(chosen_B).sum()
    pairs_in_scope = len(chosen_B) if settings.bsr_scope is BsrScope.STEP else settings.bsr_micro_pairs
    assert pairs_in_scope is not None, "RewardModelConfig demands bsr_micro_pairs with BsrScope.MICRO"
    coefficient = settings.bsr_coefficient * (pairs_in_scope if settings.bsr_scale is BsrScale.PAIRS else 1)
    blocks = zip(chosen_B.split(pairs_in_scope), rejected_B.split(pairs_in_scope), strict=True)
    return coefficient, coefficient * torch.stack(
        [batch_sum_to_zero_penalty(chosen, rejected) for chosen, rejected in blocks]
    ).mean()
