"""Objectives against closed forms worked out by hand, and the laws that tell them apart."""

import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rm_robust.config.objectives import BsrScale, BsrScope, Objective
from rm_robust.training.reward_model.losses import (
    ObjectiveValue,
    batch_sum_to_zero_penalty,
    bradley_terry_losses,
    bt_dr_losses,
    bt_norm_losses,
    centering_penalty,
    hinge_losses,
    margin_losses,
    objective_value,
)

BT, BSR = Objective.BRADLEY_TERRY, Objective.BATCH_SUM_TO_ZERO
LARGEST = torch.finfo(torch.float32).max
scores = st.floats(-20, 20, width=32)
pairs = st.lists(st.tuples(scores, scores), min_size=1, max_size=8)


@dataclass(frozen=True)
class Settings:
    """The settings of all objectives at once, which RewardModelConfig refuses: it takes those of one objective."""

    objective: Objective
    bsr_coefficient: float = 0.1
    bsr_scale: BsrScale = BsrScale.NONE
    bsr_scope: BsrScope = BsrScope.STEP
    bsr_micro_pairs: int | None = None
    norm_epsilon: float = 1e-6
    norm_temperature: float = 1.0
    centering_coefficient: float = 0.1


def value_of(
    pairs: list[tuple[float, float]], objective: Objective, *, scale: BsrScale = BsrScale.NONE
) -> ObjectiveValue:
    return objective_value(torch.tensor(pairs), Settings(objective, bsr_scale=scale))


def test_bradley_terry_is_minus_log_sigmoid_of_the_margin() -> None:
    """sigma(1) = 0.731059, sigma(-2) = 0.119203; -(ln 0.731059 + ln 0.119203) / 2 = (0.313262 + 2.126928) / 2."""
    assert bradley_terry_losses(torch.tensor([3.0, 0.0]), torch.tensor([2.0, 2.0])).mean().item() == pytest.approx(
        1.220095, abs=1e-6
    )


def test_equal_scores_cost_ln_2() -> None:
    assert value_of([(5.0, 5.0)], BT).loss == pytest.approx(math.log(2), abs=1e-6)


def test_the_penalty_is_the_square_of_the_mean_of_all_scores() -> None:
    """(1 + 2 + 3 + 6) / 4 = 3, squared 9.

    It is neither the mean of squares (12.5) nor the mean over pairs of squares ((1.5² + 4.5²) / 2 = 11.25).
    """
    assert batch_sum_to_zero_penalty(torch.tensor([1.0, 3.0]), torch.tensor([2.0, 6.0])).item() == pytest.approx(9)


def test_bsr_adds_coefficient_times_penalty_and_scales_with_pairs_as_the_released_code_does() -> None:
    batch = [(1.0, 2.0), (3.0, 6.0)]
    bt = value_of(batch, BT)
    plain, scaled = value_of(batch, BSR), value_of(batch, BSR, scale=BsrScale.PAIRS)
    assert (plain.effective_coefficient, plain.penalty) == pytest.approx((0.1, 0.9))
    assert (scaled.effective_coefficient, scaled.penalty) == pytest.approx((0.2, 1.8))
    assert plain.loss == pytest.approx(bt.loss + 0.9)
    assert (bt.effective_coefficient, bt.penalty) == (0, 0)
    assert bt.batch_mean_score == plain.batch_mean_score == pytest.approx(3)


@given(batch=pairs, shift=st.floats(-5, 5, width=32))
def test_a_shift_of_all_scores_leaves_bradley_terry_alone(batch: list[tuple[float, float]], shift: float) -> None:
    moved = [(chosen + shift, rejected + shift) for chosen, rejected in batch]
    before, after = value_of(batch, BT), value_of(moved, BT)
    assert after.loss == pytest.approx(before.loss, abs=1e-4)
    torch.testing.assert_close(after.gradient_B2, before.gradient_B2, atol=1e-5, rtol=0)


@given(batch=pairs, shift=st.sampled_from([-3.0, -0.5, 1.0, 4.0]))
def test_a_shift_of_all_scores_moves_bsr_by_the_change_of_the_squared_mean(
    batch: list[tuple[float, float]], shift: float
) -> None:
    """c ((m + s)² - m²) = c s (2 m + s)."""
    moved = [(chosen + shift, rejected + shift) for chosen, rejected in batch]
    mean = sum(map(sum, batch)) / (2 * len(batch))
    change = value_of(moved, BSR).loss - value_of(batch, BSR).loss
    assert change == pytest.approx(0.1 * shift * (2 * mean + shift), abs=2e-3)


@given(batch=pairs, scale=st.sampled_from(BsrScale))
def test_bsr_pulls_every_score_alike_by_coefficient_times_mean_over_pairs(
    batch: list[tuple[float, float]], scale: BsrScale
) -> None:
    """d(c m²)/d(score) = 2 c m / 2B = c m / B: it never looks at a single score and never opposes a margin."""
    bsr, bt = value_of(batch, BSR, scale=scale), value_of(batch, BT)
    mean = sum(map(sum, batch)) / (2 * len(batch))
    expected = bsr.effective_coefficient * mean / len(batch)
    torch.testing.assert_close(
        bsr.gradient_B2 - bt.gradient_B2, torch.full((len(batch), 2), expected), atol=1e-5, rtol=1e-4
    )


@given(batch=pairs)
def test_descent_on_free_scores_keeps_the_mean_under_bradley_terry_and_shrinks_it_under_bsr(
    batch: list[tuple[float, float]],
) -> None:
    """The Bradley-Terry gradients of a pair sum to zero.

    With the step size B / c, the BSR penalty moves every score by the mean, so one step brings the mean to zero.
    """
    scores_B2 = torch.tensor(batch)
    step_size = len(batch) / 0.1
    mean = scores_B2.double().mean().item()
    bt, bsr = value_of(batch, BT).gradient_B2.double(), value_of(batch, BSR).gradient_B2.double()
    assert (scores_B2 - step_size * bt).mean().item() == pytest.approx(mean, abs=1e-4)
    assert (scores_B2 - step_size * bsr).mean().item() == pytest.approx(0, abs=1e-3)


@given(batch=pairs)
def test_the_gradient_is_that_of_the_closed_form(batch: list[tuple[float, float]]) -> None:
    """d/d(chosen) = -sigma(-margin) / B and the opposite for rejected (paper Eq. 17-22 on one score)."""
    expected = [[-1 / (1 + math.exp(c - r)) / len(batch), 1 / (1 + math.exp(c - r)) / len(batch)] for c, r in batch]
    torch.testing.assert_close(value_of(batch, BT).gradient_B2, torch.tensor(expected), atol=1e-6, rtol=1e-4)


@given(batch=pairs)
def test_on_one_pair_scaled_bsr_is_reward_centering_at_a_quarter_of_the_coefficient(
    batch: list[tuple[float, float]],
) -> None:
    """TRL's centering is coefficient * (chosen + rejected)². On one pair, BSR has a quarter of that coefficient."""
    chosen, rejected = batch[0]
    assert value_of([(chosen, rejected)], BSR, scale=BsrScale.PAIRS).penalty == pytest.approx(
        0.1 / 4 * (chosen + rejected) ** 2, rel=1e-4, abs=1e-6
    )


@pytest.mark.parametrize("objective", Objective)
@pytest.mark.parametrize(
    "pair",
    [
        (0.0, 0.0),
        (90.0, -90.0),
        (-90.0, 90.0),
        (1e4, 1e4),
        (-1e4, -1e4),
        (LARGEST, -LARGEST),
        (-LARGEST, LARGEST),
        (LARGEST, LARGEST),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_and_gradient_are_finite_at_any_finite_score(
    objective: Objective, pair: tuple[float, float], dtype: torch.dtype
) -> None:
    """The released code: BT-Norm is NaN at (0, 0), BT-DR infinite at -90 (PAPER.md, section 8.1, points 7 and 8)."""
    finite = torch.tensor([pair], dtype=dtype).clamp(torch.finfo(dtype).min, torch.finfo(dtype).max)
    settings = Settings(objective, 1e-3, BsrScale.PAIRS, centering_coefficient=1e-3)
    value = objective_value(finite, settings, margins_B=torch.tensor([0.5]))
    assert math.isfinite(value.loss)
    assert value.gradient_B2.dtype is torch.float32
    assert value.gradient_B2.isfinite().all()


def test_the_released_codes_formulas_fail_where_ours_do_not() -> None:
    """The control: log(sigmoid(x)) underflows, and the quotient is 0 / 0."""
    low = torch.tensor([-120.0])
    assert torch.log(torch.sigmoid(low)).isinf().all()
    assert (torch.zeros(1) / torch.zeros(1).square().sqrt()).isnan().all()
    assert bt_norm_losses(torch.zeros(1), torch.zeros(1), epsilon=1e-6, temperature=1).item() == pytest.approx(
        math.log(2)
    )
    assert bt_dr_losses(low, torch.tensor([0.0])).item() == pytest.approx(240 + math.log(2))


def test_a_margin_is_subtracted_from_the_difference() -> None:
    """sigma(3 - 2 - 0.5) = sigma(0.5) = 0.622459; -ln = 0.474077."""
    assert margin_losses(torch.tensor([3.0]), torch.tensor([2.0]), torch.tensor([0.5])).item() == pytest.approx(
        0.474077, abs=1e-6
    )


def test_hinge_is_zero_beyond_the_margin_and_linear_before_it() -> None:
    losses_B = hinge_losses(torch.tensor([3.0, 1.0, 0.0]), torch.tensor([1.0, 0.5, 2.0]), torch.tensor([1.0, 1.0, 1.0]))
    assert losses_B.tolist() == [0.0, 0.5, 3.0]


@given(pair=st.tuples(st.floats(0.5, 20), st.floats(-20, 20)), factor=st.sampled_from([0.5, 2.0, 7.0]))
def test_bt_norm_sees_the_direction_of_a_pair_and_not_its_length(pair: tuple[float, float], factor: float) -> None:
    """LogitNorm; the floor of Bradley-Terry on it is -log sigma(sqrt 2) = 0.217621 (PAPER.md, section 8.1, point 7)."""
    chosen, rejected = torch.tensor([pair[0]], dtype=torch.double), torch.tensor([pair[1]], dtype=torch.double)
    loss = bt_norm_losses(chosen, rejected, epsilon=1e-12, temperature=1).item()
    assert bt_norm_losses(factor * chosen, factor * rejected, epsilon=1e-12, temperature=1).item() == pytest.approx(
        loss, abs=1e-6
    )
    assert loss >= 0.217620
    assert bt_norm_losses(chosen, -chosen, epsilon=1e-12, temperature=1).item() == pytest.approx(0.217621, abs=1e-5)
    half = bt_norm_losses(chosen, -chosen, epsilon=1e-12, temperature=2).item()
    assert half == pytest.approx(math.log(1 + math.exp(-math.sqrt(2) / 2)), abs=1e-5)


def test_bt_dr_adds_the_likelihood_that_chosen_is_positive_and_rejected_negative() -> None:
    """softplus(-(1 + 2)) + softplus(-1) + softplus(-2) = 0.048587 + 0.313262 + 0.126928."""
    assert bt_dr_losses(torch.tensor([1.0]), torch.tensor([-2.0])).item() == pytest.approx(0.488777, abs=1e-6)


def test_centering_is_the_mean_over_pairs_of_the_squared_sum() -> None:
    """((1 + 2)² + (3 + 6)²) / 2 = 45."""
    assert centering_penalty(torch.tensor([1.0, 3.0]), torch.tensor([2.0, 6.0])).item() == pytest.approx(45)
    assert value_of([(1.0, 2.0), (3.0, 6.0)], Objective.CENTERING).penalty == pytest.approx(4.5)


def test_micro_scope_with_pairs_is_the_released_codes_loss() -> None:
    """reward_trainer.py, l. 318-322, on two devices of two pairs.

    The loss is the mean over devices of BT.mean() + (lambda * 2) * mean(cat(r_c, r_r))².
    """
    batch_B2 = torch.tensor([[1.0, 2.0], [3.0, 6.0], [-1.0, -2.0], [0.5, 0.0]])
    devices = [
        -torch.nn.functional.logsigmoid(pairs_22[:, 0] - pairs_22[:, 1]).mean()
        + (0.1 * 2) * torch.mean(torch.cat([pairs_22[:, 0], pairs_22[:, 1]])) ** 2
        for pairs_22 in batch_B2.split(2)
    ]
    value = objective_value(batch_B2, Settings(BSR, 0.1, BsrScale.PAIRS, BsrScope.MICRO, bsr_micro_pairs=2))
    assert value.loss == pytest.approx((sum(devices) / 2).item(), abs=1e-6)
    assert value.effective_coefficient == pytest.approx(0.2)
    assert value_of([tuple(row) for row in batch_B2.tolist()], BSR, scale=BsrScale.PAIRS).loss != pytest.approx(
        value.loss, abs=1e-2
    )


@given(batch=pairs, factor=st.sampled_from([0.5, 3.0]))
def test_weights_act_by_their_proportions_and_leave_penalties_alone(
    batch: list[tuple[float, float]], factor: float
) -> None:
    settings, weights_B = Settings(BSR, 0.1, BsrScale.PAIRS), torch.arange(1.0, len(batch) + 1)
    value = objective_value(torch.tensor(batch), settings, weights_B=weights_B)
    scaled = objective_value(torch.tensor(batch), settings, weights_B=factor * weights_B)
    assert value.loss == pytest.approx(scaled.loss, rel=1e-6)
    assert value.penalty == value_of(batch, BSR, scale=BsrScale.PAIRS).penalty
    repeated = [pair for number, pair in enumerate(batch, start=1) for _ in range(number)]
    assert value.pair_loss == pytest.approx(value_of(repeated, BT).loss, rel=1e-6)


def test_a_lost_pair_is_penalised_by_its_margin_however_large() -> None:
    assert value_of([(-1e4, 1e4)], BT).loss == pytest.approx(2e4)
    assert value_of([(-1e4, 1e4)], BT).gradient_B2.tolist() == [[-1.0, 1.0]]


def test_the_objective_leaves_the_graph_of_the_scores_alone() -> None:
    scores_B2 = torch.tensor([[1.0, 2.0]], requires_grad=True)
    value = objective_value(scores_B2 * 1, Settings(BSR, 1.0, BsrScale.NONE))
    assert scores_B2.grad is None
    assert not value.gradient_B2.requires_grad
