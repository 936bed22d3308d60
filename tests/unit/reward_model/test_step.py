"""One optimiser step gives the objective's gradient over the whole batch, however it is cut into micro-batches."""

import copy
from random import Random

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from rm_robust.config import OptimizerConfig
from rm_robust.errors import ScoringError
from rm_robust.packing import Layout, group_length
from rm_robust.reward_model.losses import BsrScale, Objective
from rm_robust.reward_model.model import PackedRewardModel
from rm_robust.reward_model.step import StepSettings, gather_rows, reward_model_step
from rm_robust.train_engine import DdpEngine
from tests.tiny_models import random_group, tiny_reward_model

CPU = torch.device("cpu")
COEFFICIENT = 0.5
PAIRS = [random_group(Random(seed), num_completions=2) for seed in range(6)]


def step_with(model: PreTrainedModel, *, max_tokens: int, layout: Layout = Layout.SEGMENTS) -> tuple[dict[str, float], dict[str, Tensor]]:
    packed = PackedRewardModel(model, layout)
    engine = DdpEngine(packed, optimizer=OptimizerConfig(kind="sgd"), device=CPU)
    settings = StepSettings(Objective.BATCH_SUM_TO_ZERO, COEFFICIENT, BsrScale.NONE, max_tokens, pad_id=0)
    metrics = reward_model_step(engine, PAIRS, settings, model=packed, device=CPU)
    return metrics, {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def plain_scores(model: PreTrainedModel) -> Tensor:
    """[B, 2], one transformers forward a completion."""
    rows = [torch.tensor([pair.prompt_ids + completion]) for pair in PAIRS for completion in pair.completion_ids]
    return torch.cat([model(input_ids=row).logits[0] for row in rows]).view(-1, 2)


@pytest.mark.parametrize("max_tokens", [10_000, 40, 1])
@pytest.mark.parametrize("layout", Layout)
def test_gradient_and_loss_are_those_of_the_formula_on_plain_scores(max_tokens: int, layout: Layout) -> None:
    model = tiny_reward_model()
    expected_model = copy.deepcopy(model)
    scores_B2 = plain_scores(expected_model)
    loss = torch.nn.functional.softplus(scores_B2[:, 1] - scores_B2[:, 0]).mean() + COEFFICIENT * scores_B2.mean() ** 2
    loss.backward()
    metrics, gradients = step_with(model, max_tokens=max_tokens, layout=layout)
    assert metrics["reward_model/loss"] == pytest.approx(loss.item(), abs=1e-6)
    for name, parameter in expected_model.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, atol=1e-5, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


def test_many_micro_batches_report_the_same_metrics_as_one() -> None:
    one, _ = step_with(tiny_reward_model(), max_tokens=10_000)
    many, _ = step_with(tiny_reward_model(), max_tokens=1)
    assert many == pytest.approx(one, abs=1e-5)


def test_the_metrics_are_those_of_the_plain_scores() -> None:
    model = tiny_reward_model()
    scores_B2 = plain_scores(copy.deepcopy(model)).detach()
    metrics, _ = step_with(model, max_tokens=10_000)
    chosen_B, rejected_B = scores_B2.unbind(1)
    assert metrics["reward_model/accuracy"] == pytest.approx((chosen_B > rejected_B).float().mean().item())
    assert metrics["reward_model/margin_mean"] == pytest.approx((chosen_B - rejected_B).mean().item(), abs=1e-5)
    assert metrics["reward_model/batch_mean_score"] == pytest.approx(scores_B2.mean().item(), abs=1e-5)
    assert metrics["reward_model/bsr_term"] == pytest.approx(COEFFICIENT * scores_B2.mean().item() ** 2, abs=1e-5)
    assert metrics["reward_model/num_tokens"] == sum(group_length(pair) for pair in PAIRS)


def test_a_score_that_is_not_finite_stops_the_step_before_any_gradient() -> None:
    model = tiny_reward_model()
    with torch.no_grad():
        model.score.weight[0, 0] = torch.nan
    with pytest.raises(ScoringError, match="lower the learning rate"):
        step_with(model, max_tokens=10_000)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_single_process_gathers_its_own_rows() -> None:
    rows_N, start = gather_rows(torch.tensor([1.0, 2.0]))
    assert (rows_N.tolist(), start) == ([1.0, 2.0], 0)
