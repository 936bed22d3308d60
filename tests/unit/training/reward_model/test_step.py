"""One optimiser step gives the objective's gradient over the whole batch, however it is cut into micro-batches."""

import copy
from random import Random

import pytest
import scipy.stats
import torch
from torch import Tensor
from transformers import PreTrainedModel

from rm_robust.config.objectives import BsrScale, BsrScope, Objective
from rm_robust.config.shared import OptimizerConfig
from rm_robust.config.training import RewardModelConfig
from rm_robust.data.records import PreferencePair
from rm_robust.errors import ScoringError
from rm_robust.models.packing import Layout, group_length
from rm_robust.models.reward_model import PackedRewardModel
from rm_robust.training.engines.ddp import DdpEngine
from rm_robust.training.reward_model.step import StepSettings, gather_rows, reward_model_step
from tests.support.tiny_models import TRAINED_ON_CPU, random_group, tiny_reward_model

WEIGHTS_B = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]) / 21
CPU = torch.device("cpu")
COEFFICIENT = 0.5
PAIRS = [
    PreferencePair(random_group(Random(seed), num_completions=2), margin=0.1 * seed, weight=1.0 + seed)
    for seed in range(6)
]
BSR = RewardModelConfig(objective=Objective.BATCH_SUM_TO_ZERO, bsr_coefficient=COEFFICIENT, bsr_scale=BsrScale.NONE)
SETTINGS = {
    Objective.HINGE: {"margin": 0.5},
    Objective.BATCH_SUM_TO_ZERO: {"bsr_coefficient": COEFFICIENT},
    Objective.CENTERING: {"centering_coefficient": COEFFICIENT},
}
"""The settings that these tests change, by the objective that reads them."""


def step_with(
    model: PreTrainedModel, *, max_tokens: int, layout: Layout = Layout.SEGMENTS, objective: RewardModelConfig = BSR
) -> tuple[dict[str, float], dict[str, Tensor]]:
    packed = PackedRewardModel(model, layout)
    engine = DdpEngine(packed, optimizer=OptimizerConfig(kind="sgd"), device=CPU)
    settings = StepSettings(objective, max_tokens, pad_id=0)
    metrics = reward_model_step(engine, PAIRS, settings, model=packed, device=CPU)
    return metrics, {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def plain_scores(model: PreTrainedModel) -> Tensor:
    """Return the scores [B, 2] with one transformers forward for each completion."""
    rows = [
        torch.tensor([pair.tokens.prompt_ids + completion])
        for pair in PAIRS
        for completion in pair.tokens.completion_ids
    ]
    return torch.cat([model(input_ids=row).logits[0] for row in rows]).view(-1, 2)


@pytest.mark.parametrize("max_tokens", [10_000, 40, 1])
@pytest.mark.parametrize("layout", TRAINED_ON_CPU)
def test_gradient_and_loss_are_those_of_the_formula_on_plain_scores(max_tokens: int, layout: Layout) -> None:
    model = tiny_reward_model()
    expected_model = copy.deepcopy(model)
    scores_B2 = plain_scores(expected_model)
    loss = (
        torch.nn.functional.softplus(scores_B2[:, 1] - scores_B2[:, 0]) * WEIGHTS_B
    ).sum() + COEFFICIENT * scores_B2.mean() ** 2
    loss.backward()
    metrics, gradients = step_with(model, max_tokens=max_tokens, layout=layout)
    assert metrics["reward_model/loss"] == pytest.approx(loss.item(), abs=1e-6)
    for name, parameter in expected_model.named_parameters():
        torch.testing.assert_close(
            gradients[name], parameter.grad, atol=1e-5, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("max_tokens", [10_000, 40, 1])
def test_margins_weights_and_blocks_follow_their_pairs_through_any_micro_batches(max_tokens: int) -> None:
    """Micro-batches are filled longest pair first, but the blocks of two are still the pairs (0, 1), (2, 3), (4, 5)."""
    scores_B2 = plain_scores(tiny_reward_model()).detach()
    chosen_B, rejected_B = scores_B2.unbind(1)
    margins_B = torch.tensor([0.0, 0.1, 0.2, 0.3, 0.4, 0.5])
    margin = (torch.nn.functional.softplus(rejected_B - chosen_B + margins_B) * WEIGHTS_B).sum().item()
    penalty = COEFFICIENT * 2 * scores_B2.view(3, 4).mean(1).square().mean().item()
    margins = RewardModelConfig(objective=Objective.MARGIN)
    metrics, _ = step_with(tiny_reward_model(), max_tokens=max_tokens, objective=margins)
    assert metrics["reward_model/loss"] == pytest.approx(margin, abs=1e-5)
    blocks = RewardModelConfig(
        objective=Objective.BATCH_SUM_TO_ZERO,
        bsr_coefficient=COEFFICIENT,
        bsr_scale=BsrScale.PAIRS,
        bsr_scope=BsrScope.MICRO,
        bsr_micro_pairs=2,
    )
    metrics, _ = step_with(tiny_reward_model(), max_tokens=max_tokens, objective=blocks)
    assert metrics["reward_model/penalty"] == pytest.approx(penalty, abs=1e-5)


@pytest.mark.parametrize("objective", Objective)
def test_micro_batches_of_any_objective_give_one_gradient_and_only_coupled_ones_compute_scores_twice(
    objective: Objective,
) -> None:
    settings = RewardModelConfig.model_validate({"objective": objective, **SETTINGS.get(objective, {})})
    one, expected = step_with(tiny_reward_model(), max_tokens=10_000, objective=settings)
    model, num_forwards = tiny_reward_model(), 0

    def count(*_: object) -> None:
        nonlocal num_forwards
        num_forwards += 1

    model.model.layers[0].register_forward_hook(count)
    many, gradients = step_with(model, max_tokens=1, objective=settings)
    assert many == pytest.approx(one, abs=1e-5)
    for name, gradient in expected.items():
        torch.testing.assert_close(
            gradients[name], gradient, atol=1e-6, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
        )
    assert num_forwards == len(PAIRS) * (2 if objective in (Objective.BATCH_SUM_TO_ZERO, Objective.CENTERING) else 1)


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
    assert metrics["reward_model/penalty"] == pytest.approx(COEFFICIENT * scores_B2.mean().item() ** 2, abs=1e-5)
    lengths_N = [len(ids) for pair in PAIRS for ids in pair.tokens.completion_ids]
    scores = scores_B2.flatten().numpy()
    assert metrics["reward_model/score_skewness"] == pytest.approx(float(scipy.stats.skew(scores)), abs=1e-4)
    assert metrics["reward_model/score_length_correlation"] == pytest.approx(
        float(scipy.stats.pearsonr(scores, lengths_N).statistic), abs=1e-4
    )
    assert (metrics["reward_model/score_min"], metrics["reward_model/score_max"]) == pytest.approx(
        (scores.min(), scores.max()), abs=1e-5
    )
    assert metrics["reward_model/num_tokens"] == sum(group_length(pair.tokens) for pair in PAIRS)
    assert metrics["reward_model/num_repeated_tokens"] == sum(2 * len(p.tokens.prompt_ids) for p in PAIRS) + sum(
        lengths_N
    )


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
