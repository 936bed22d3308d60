"""Autocast and gradient checkpointing change how a step is computed, not what it means."""

from random import Random

import pytest
import torch
from torch import Tensor

from rm_robust.config.shared import ComputeConfig
from rm_robust.models.compute import prepare_for_training
from rm_robust.models.packing import Layout, lay_out
from rm_robust.models.reward_model import PackedRewardModel, score_head
from tests.support.tiny_models import TRAINED_ON_CPU, random_group, tiny_reward_model

GROUPS = [random_group(Random(seed), num_completions=3) for seed in range(4)]


def scores_and_gradient(compute: ComputeConfig, layout: Layout) -> tuple[Tensor, Tensor, int]:
    """Return the scores [N], the gradient of their sum of squares, and how often a decoder layer ran forward."""
    model = tiny_reward_model().eval()  # as from_pretrained leaves it
    prepare_for_training(model, compute)
    packed = PackedRewardModel(model, layout, compute)
    num_runs = 0

    def count(*_: object) -> None:
        nonlocal num_runs
        num_runs += 1

    packed.backbone.layers[0].self_attn.register_forward_hook(count)
    scores_N = packed(lay_out(GROUPS, layout, pad_id=0)).scores_N
    scores_N.square().sum().backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    assert not model.training
    return scores_N.detach(), gradient, num_runs


@pytest.mark.parametrize("layout", TRAINED_ON_CPU)
def test_checkpointed_layers_run_twice_and_give_the_same_gradient(layout: Layout) -> None:
    scores_N, gradient, num_runs = scores_and_gradient(ComputeConfig(), layout)
    again_N, again, num_again = scores_and_gradient(ComputeConfig(gradient_checkpointing=True), layout)
    assert (num_runs, num_again) == (1, 2)
    torch.testing.assert_close(again_N, scores_N)
    torch.testing.assert_close(again, gradient)


def test_compiled_blocks_give_the_same_scores_and_gradient() -> None:
    scores_N, gradient, _ = scores_and_gradient(ComputeConfig(), Layout.SEGMENTS)
    compiled_N, compiled, _ = scores_and_gradient(ComputeConfig(compile=True), Layout.SEGMENTS)
    torch.testing.assert_close(compiled_N, scores_N)
    torch.testing.assert_close(compiled, gradient)


@pytest.mark.parametrize("layout", TRAINED_ON_CPU)
def test_bfloat16_rounds_products_and_keeps_weights_and_scores_in_float32(layout: Layout) -> None:
    exact_N, exact, _ = scores_and_gradient(ComputeConfig(), layout)
    rounded_N, rounded, _ = scores_and_gradient(ComputeConfig(precision="bfloat16"), layout)
    assert rounded_N.dtype is rounded.dtype is torch.float32
    assert 0 < (rounded_N - exact_N).abs().max() < 0.1 * exact_N.abs().max()
    assert torch.nn.functional.cosine_similarity(rounded, exact, dim=0) > 0.99
    model = tiny_reward_model()
    packed = PackedRewardModel(model, layout, ComputeConfig(precision="bfloat16"))
    hidden_NH = packed(lay_out(GROUPS, layout, pad_id=0)).hidden_after_final_norm_NH
    torch.testing.assert_close(rounded_N, (hidden_NH @ score_head(model).weight[0]), atol=1e-6, rtol=1e-5)
