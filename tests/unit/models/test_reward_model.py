"""The reward model: the paper's head, float32 scores, plain transformers directories, and no random trained weight."""

import math
from pathlib import Path
from random import Random

import pytest
import torch
from transformers import AutoModelForSequenceClassification, Qwen2ForSequenceClassification

from rm_robust.errors import CheckpointError
from rm_robust.models.packing import Layout, lay_out
from rm_robust.models.reward_model import PackedRewardModel, load_reward_model, new_reward_model, score_head
from tests.support.tiny_models import random_group, save_tiny_qwen2, tiny_reward_model


@pytest.fixture(scope="module")
def base_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_qwen2(tmp_path_factory.mktemp("models") / "base", tie_word_embeddings=True)


def test_a_new_head_is_drawn_with_variance_one_over_hidden_size_plus_one(base_dir: Path) -> None:
    weight_1H = torch.cat([score_head(new_reward_model(base_dir, pad_id=0, seed=seed)).weight for seed in range(20)])
    num_weights = weight_1H.numel()  # 20 heads of H = 128
    assert num_weights == 20 * 128
    assert weight_1H.mean().item() == pytest.approx(0, abs=4 / math.sqrt(129 * num_weights))
    assert weight_1H.var().item() == pytest.approx(1 / 129, rel=4 * math.sqrt(2 / num_weights))


def test_the_same_seed_draws_the_same_head_whatever_was_drawn_before(base_dir: Path) -> None:
    first = new_reward_model(base_dir, pad_id=0, seed=3).score.weight
    torch.rand(7)
    assert torch.equal(new_reward_model(base_dir, pad_id=0, seed=3).score.weight, first)
    assert not torch.equal(new_reward_model(base_dir, pad_id=0, seed=4).score.weight, first)


def test_a_new_reward_model_keeps_the_language_models_backbone_and_names_its_pad_token(base_dir: Path) -> None:
    model = new_reward_model(base_dir, pad_id=5, seed=0)
    base = AutoModelForSequenceClassification.from_pretrained(base_dir, num_labels=1)
    for name, weight in base.model.state_dict().items():
        assert torch.equal(model.model.state_dict()[name], weight), name
    assert (model.config.num_labels, model.config.pad_token_id) == (1, 5)


def test_training_goes_on_from_a_trained_reward_model_with_its_own_head(tmp_path: Path) -> None:
    """The released code draws a new one."""
    trained = tiny_reward_model(seed=5)
    trained.save_pretrained(tmp_path)
    assert torch.equal(score_head(new_reward_model(tmp_path, pad_id=0, seed=0)).weight, score_head(trained).weight)


def test_a_base_without_all_backbone_weights_or_with_several_scores_is_refused(base_dir: Path, tmp_path: Path) -> None:
    model = Qwen2ForSequenceClassification.from_pretrained(base_dir, num_labels=1)
    lost = "model.layers.1.mlp.up_proj.weight"
    model.save_pretrained(
        tmp_path / "part", state_dict={name: weight for name, weight in model.state_dict().items() if name != lost}
    )
    with pytest.raises(CheckpointError, match=f"lacks trained weights for .*{lost}"):
        new_reward_model(tmp_path / "part", pad_id=0, seed=0)
    Qwen2ForSequenceClassification.from_pretrained(base_dir, num_labels=2).save_pretrained(tmp_path / "two")
    with pytest.raises(CheckpointError, match="other shapes.*score.weight"):
        new_reward_model(tmp_path / "two", pad_id=0, seed=0)


def test_a_saved_reward_model_loads_with_equal_weights(tmp_path: Path) -> None:
    model = tiny_reward_model()
    model.save_pretrained(tmp_path)
    loaded = load_reward_model(tmp_path, dtype=torch.float32)
    assert all(torch.equal(loaded.state_dict()[name], weight) for name, weight in model.state_dict().items())


def test_a_language_model_is_refused_where_a_trained_head_is_needed(base_dir: Path) -> None:
    with pytest.raises(CheckpointError, match="num_labels=2"):
        load_reward_model(base_dir, dtype=torch.float32)


def test_a_checkpoint_without_head_weights_is_refused_by_the_weights_name(tmp_path: Path) -> None:
    model = tiny_reward_model()
    state = {name: weight for name, weight in model.state_dict().items() if name != "score.weight"}
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(CheckpointError, match=r"score\.weight"):
        load_reward_model(tmp_path, dtype=torch.float32)


def test_a_head_with_two_labels_or_a_bias_is_refused() -> None:
    model = tiny_reward_model()
    for head in (torch.nn.Linear(64, 2, bias=False), torch.nn.Linear(64, 1), torch.nn.Identity()):
        model.score = head
        with pytest.raises(CheckpointError, match="only one bias-free linear layer"):
            score_head(model)


def test_scores_are_float32_products_of_head_and_final_hidden_state_and_norms_are_theirs() -> None:
    model = tiny_reward_model()
    group = random_group(Random(0), num_completions=1)
    before_H: list[torch.Tensor] = []
    hook = model.model.norm.register_forward_pre_hook(lambda _, inputs: before_H.append(inputs[0][0, -1]))
    last_H = model.model(input_ids=torch.tensor([group.prompt_ids + group.completion_ids[0]])).last_hidden_state[0, -1]
    hook.remove()
    scored = PackedRewardModel(model, Layout.SEGMENTS)(lay_out([group], Layout.SEGMENTS, pad_id=0))
    assert scored.scores_N.item() == pytest.approx((model.score.weight[0] @ last_H).item(), rel=1e-4)
    assert scored.hidden_after_final_norm_NH.norm().item() == pytest.approx(last_H.norm().item(), rel=1e-4)
    assert scored.hidden_before_final_norm_NH.norm().item() == pytest.approx(before_H[0].norm().item(), rel=1e-4)


def test_a_bfloat16_backbone_still_gives_float32_scores_that_no_rounding_ties() -> None:
    """bfloat16 has 8 bits: scores rounded to it would lie on a grid of 2^-8 of their size."""
    model: Qwen2ForSequenceClassification = tiny_reward_model().bfloat16()
    groups = [random_group(Random(seed), num_completions=2) for seed in range(8)]
    scores_N = PackedRewardModel(model, Layout.PADDED)(lay_out(groups, Layout.PADDED, pad_id=0)).scores_N
    assert scores_N.dtype is torch.float32
    assert not torch.equal(scores_N, scores_N.bfloat16().float())


def test_scores_carry_a_gradient_and_norms_do_not() -> None:
    scored = PackedRewardModel(tiny_reward_model(), Layout.SEGMENTS)(
        lay_out([random_group(Random(0), num_completions=2)], Layout.SEGMENTS, pad_id=0)
    )
    assert scored.scores_N.requires_grad
    assert not scored.hidden_before_final_norm_NH.requires_grad
    assert not scored.hidden_after_final_norm_NH.requires_grad
