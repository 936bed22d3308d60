"""The learning-rate schedule, the optimiser's groups and one step of the engine, against values worked out by hand."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from rm_robust.config.shared import OptimizerConfig, StrategyConfig
from rm_robust.training.engines import create_engine
from rm_robust.training.engines.ddp import DdpEngine
from rm_robust.training.engines.engine import largest_over_ranks, learning_rate_at, new_optimizer

CPU = torch.device("cpu")


def rates(num_steps: int, **values: object) -> list[float]:
    """Return the learning rate of every step, with a peak of 0.1. `values` are settings of OptimizerConfig."""
    config = OptimizerConfig.model_validate({"learning_rate": 0.1, **values})
    return [learning_rate_at(step, num_steps, config) for step in range(num_steps)]


def test_warm_up_rises_in_equal_parts_to_the_peak_and_linear_decay_falls_in_equal_parts_towards_zero() -> None:
    """Ten steps, 0.2 of them warm-up: 1/2, 1, then (8 - i) / 8 for i = 0 … 7; the eleventh step would have zero."""
    assert rates(10, warmup_fraction=0.2, schedule="linear") == pytest.approx(
        [0.05, 0.1, *(0.1 * (8 - i) / 8 for i in range(8))]
    )


def test_constant_stays_at_the_peak_and_cosine_is_at_half_of_it_half_way() -> None:
    assert rates(5, warmup_fraction=0.4, schedule="constant") == pytest.approx([0.05, 0.1, 0.1, 0.1, 0.1])
    assert rates(8, warmup_fraction=0, schedule="cosine")[4] == pytest.approx(0.05)
    assert rates(8, warmup_fraction=0, schedule="cosine")[2] == pytest.approx(0.1 * 0.5 * (1 + math.sqrt(0.5)))


@given(
    num_steps=st.integers(1, 200), warmup=st.floats(0, 0.9), schedule=st.sampled_from(["constant", "linear", "cosine"])
)
def test_no_step_is_at_zero_or_above_the_peak_and_the_peak_is_reached(
    num_steps: int, warmup: float, schedule: str
) -> None:
    values = rates(num_steps, warmup_fraction=warmup, schedule=schedule)
    assert all(0 < value <= 0.1 * (1 + 1e-12) for value in values)
    assert max(values) == pytest.approx(0.1)
    top = values.index(max(values))
    assert values[:top] == sorted(values[:top])
    assert values[top:] == sorted(values[top:], reverse=True)


def test_weight_decay_spares_vectors() -> None:
    module = nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2))
    groups = new_optimizer(module, OptimizerConfig(weight_decay=0.1)).param_groups
    assert [(group["weight_decay"], [p.ndim for p in group["params"]]) for group in groups] == [
        (0.1, [2]),
        (0.0, [1, 1, 1]),
    ]


def test_frozen_parameters_are_not_optimised() -> None:
    module = nn.Linear(3, 2)
    module.bias.requires_grad_(False)
    (group,) = new_optimizer(module, OptimizerConfig()).param_groups
    assert group["params"] == [module.weight]


def sgd_engine(*, max_gradient_norm: float) -> DdpEngine:
    """Return an engine of one rank whose module is the dot product of its two weights, 0 at first, with its input."""
    module = nn.Linear(2, 1, bias=False)
    nn.init.zeros_(module.weight)
    return DdpEngine(module, optimizer=OptimizerConfig(kind="sgd", max_gradient_norm=max_gradient_norm), device=CPU)


@pytest.mark.parametrize(("max_gradient_norm", "expected"), [(100.0, [-0.3, -0.4]), (1.0, [-0.06, -0.08])])
def test_a_step_takes_the_given_rate_clips_to_the_norm_and_reports_the_norm_before_clipping(
    max_gradient_norm: float, expected: list[float]
) -> None:
    """The gradient of 3 a + 4 b is (3, 4), of norm 5."""
    engine = sgd_engine(max_gradient_norm=max_gradient_norm)
    engine.backward(engine.forward(torch.tensor([3.0, 4.0])).sum())
    assert engine.step(0.1) == pytest.approx(5)
    assert engine.full_state_dict()["weight"][0].tolist() == pytest.approx(expected)


def test_terms_add_up_until_the_step_and_start_again_after_it() -> None:
    engine = sgd_engine(max_gradient_norm=100)
    for is_last in (False, True):
        with engine.micro_batch(is_last=is_last):
            engine.backward(engine.forward(torch.tensor([1.0, 0.0])).sum())
    assert engine.step(0.1) == pytest.approx(2)
    engine.backward(engine.forward(torch.tensor([0.0, 3.0])).sum())
    assert engine.step(0.1) == pytest.approx(3)
    assert engine.full_state_dict()["weight"][0].tolist() == pytest.approx([-0.2, -0.3])


def test_a_gradient_that_is_not_finite_is_an_error_and_moves_nothing() -> None:
    engine = sgd_engine(max_gradient_norm=1)
    engine.backward(engine.forward(torch.tensor([math.nan, 0.0])).sum())
    with pytest.raises(RuntimeError, match="non-finite"):
        engine.step(0.1)
    assert engine.full_state_dict()["weight"].tolist() == [[0, 0]]


def test_the_config_names_the_engine() -> None:
    assert isinstance(
        create_engine(nn.Linear(1, 1), strategy=StrategyConfig(), optimizer=OptimizerConfig(), device=CPU), DdpEngine
    )


def test_the_state_dict_of_one_rank_is_the_modules_own() -> None:
    engine = sgd_engine(max_gradient_norm=1)
    assert list(engine.full_state_dict()) == ["weight"]
    assert torch.equal(engine.full_parameter(engine.module.weight), engine.module.weight)
    assert not engine.full_parameter(engine.module.weight).requires_grad


def test_a_single_process_is_its_own_busiest_rank() -> None:
    assert largest_over_ranks(3, CPU) == 3
