"""The clipped policy loss case by case, and that on policy it is REINFORCE."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rm_robust.rloo.losses import clipped_policy_loss_terms


def term(log_ratio: float, advantage: float) -> tuple[float, float]:
    """Loss term and its gradient by the new log-probability, at clip range 0.2."""
    new_N = torch.tensor([log_ratio - 3.0], requires_grad=True)
    terms_N = clipped_policy_loss_terms(new_N, torch.tensor([-3.0]), torch.tensor([advantage]), clip_range=0.2)
    terms_N.sum().backward()
    assert new_N.grad is not None
    return terms_N.item(), new_N.grad.item()


@pytest.mark.parametrize(
    ("ratio", "advantage", "expected", "gradient"),
    [
        (1.1, 2.0, -2.2, -2.2),  # inside: -A r
        (1.5, 2.0, -2.4, 0.0),  # better already made likelier: clipped at 1.2, no more push
        (0.5, 2.0, -1.0, -1.0),  # better made less likely: not clipped
        (1.5, -2.0, 3.0, 3.0),  # worse made likelier: not clipped
        (0.5, -2.0, 1.6, 0.0),  # worse already made less likely: clipped at 0.8
    ],
)
def test_the_term_is_the_worse_of_ratio_and_clipped_ratio(ratio: float, advantage: float, expected: float, gradient: float) -> None:
    assert term(math.log(ratio), advantage) == pytest.approx((expected, gradient), abs=1e-5)


@given(advantage=st.floats(-10, 10, width=32))
def test_on_policy_the_gradient_is_that_of_reinforce(advantage: float) -> None:
    """Minus advantage times the gradient of the log-probability."""
    assert term(0.0, advantage) == pytest.approx((-advantage, -advantage), abs=1e-5)


def test_every_completion_has_its_own_term() -> None:
    terms_N = clipped_policy_loss_terms(torch.tensor([-1.0, -9.0]), torch.tensor([-1.0, -9.0]), torch.tensor([1.0, -2.0]), clip_range=0.2)
    assert terms_N.tolist() == [-1.0, 2.0]
