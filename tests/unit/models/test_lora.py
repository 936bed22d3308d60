"""A reward model with adapters keeps its head: trained, saved, reloaded and merged, it scores as it did in training."""

import copy
from pathlib import Path
from random import Random

import peft
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from rm_robust.config.objectives import Objective
from rm_robust.config.shared import OptimizerConfig
from rm_robust.config.training import LoraConfig, RewardModelConfig
from rm_robust.data.records import PreferencePair
from rm_robust.errors import CheckpointError
from rm_robust.models.lora import ADAPTER_DIR, add_adapters, save_merged
from rm_robust.models.packing import Layout, lay_out
from rm_robust.models.reward_model import PackedRewardModel, load_reward_model, score_head
from rm_robust.training.engines.ddp import DdpEngine
from rm_robust.training.reward_model.step import StepSettings, reward_model_step
from tests.support.tiny_models import random_group, tiny_reward_model

CPU = torch.device("cpu")
PAIRS = [PreferencePair(random_group(Random(seed), num_completions=2)) for seed in range(4)]
BATCH = lay_out([pair.tokens for pair in PAIRS], Layout.SEGMENTS, pad_id=0)
LORA = LoraConfig(rank=4, alpha=16)


def scores_of(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        scores_N: Tensor = PackedRewardModel(model, Layout.SEGMENTS)(BATCH).scores_N
    return scores_N


@pytest.fixture(scope="module")
def trained() -> tuple[PreTrainedModel, dict[str, Tensor]]:
    """Train five steps; return the adapted model, and its state as an engine returns it."""
    model = tiny_reward_model()
    add_adapters(model, LORA)
    packed = PackedRewardModel(model, Layout.SEGMENTS)
    engine = DdpEngine(packed, optimizer=OptimizerConfig(), device=CPU)
    for _ in range(5):
        reward_model_step(
            engine,
            PAIRS,
            StepSettings(RewardModelConfig(objective=Objective.BRADLEY_TERRY), 10_000, pad_id=0),
            model=packed,
            device=CPU,
        )
        engine.step(1e-2)
    return model, {name.removeprefix("model."): tensor for name, tensor in engine.full_state_dict().items()}


def test_only_adapters_and_the_head_are_trained(trained: tuple[PreTrainedModel, dict[str, Tensor]]) -> None:
    model, _ = trained
    untouched = dict(tiny_reward_model().named_parameters())
    learned = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert learned
    assert all(".lora_" in name or name == "score.modules_to_save.default.weight" for name in learned)
    for name, parameter in model.named_parameters():
        if (
            name not in learned
            and (plain := name.replace(".base_layer", "").replace(".original_module", "")) in untouched
        ):
            assert torch.equal(parameter, untouched[plain]), name
    assert not torch.equal(score_head(model).weight, untouched["score.weight"])
    assert not torch.allclose(scores_of(model), scores_of(tiny_reward_model()), atol=1e-2)


def test_adapters_have_no_dropout(trained: tuple[PreTrainedModel, dict[str, Tensor]]) -> None:
    """PEFT's modules stay in training mode; with dropout two passes over one batch would give two scores."""
    model, _ = trained
    assert torch.equal(scores_of(model), scores_of(model))
    assert not [module for module in model.modules() if isinstance(module, torch.nn.Dropout) and module.p]


def test_the_merged_checkpoint_scores_as_the_adapted_model_did(
    trained: tuple[PreTrainedModel, dict[str, Tensor]], tmp_path: Path
) -> None:
    model, state = trained
    save_merged(add_adapters(tiny_reward_model(), LORA), state, tmp_path)
    merged = load_reward_model(tmp_path, dtype=torch.float32)
    assert not any("lora" in name for name, _ in merged.named_parameters())
    torch.testing.assert_close(scores_of(merged), scores_of(model), atol=1e-5, rtol=0)
    assert torch.equal(score_head(merged).weight, score_head(model).weight)


def test_the_saved_adapter_alone_brings_its_head(
    trained: tuple[PreTrainedModel, dict[str, Tensor]], tmp_path: Path
) -> None:
    model, state = trained
    save_merged(add_adapters(tiny_reward_model(), LORA), state, tmp_path / "merged")
    tiny_reward_model().save_pretrained(tmp_path / "base")
    base = AutoModelForSequenceClassification.from_pretrained(str(tmp_path / "base"))
    torch.nn.init.zeros_(base.score.weight)
    reloaded = peft.PeftModel.from_pretrained(base, str(tmp_path / "merged" / ADAPTER_DIR)).get_base_model()
    torch.testing.assert_close(scores_of(reloaded), scores_of(model), atol=1e-5, rtol=0)


def test_a_state_without_its_head_is_not_saved(
    trained: tuple[PreTrainedModel, dict[str, Tensor]], tmp_path: Path
) -> None:
    """PEFT's own loading accepts adapters without the head that was trained with them."""
    _, state = copy.deepcopy(trained)
    del state["score.modules_to_save.default.weight"]
    with pytest.raises(CheckpointError, match=r"missing \['score.modules_to_save.default.weight'\]"):
        save_merged(add_adapters(tiny_reward_model(), LORA), state, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
