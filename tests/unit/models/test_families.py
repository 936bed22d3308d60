"""Every decoder family gives the log-probabilities, scores and gradients of transformers' own eager forward pass."""

import copy
from random import Random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

from rm_robust.data.records import TokenGroup
from rm_robust.models.packing import SEGMENT_MODEL_TYPES, Layout, choose_layout, lay_out
from rm_robust.models.policy import PackedPolicy
from rm_robust.models.reward_model import PackedRewardModel
from tests.support.tiny_models import gradients_of, random_group

CPU = torch.device("cpu")
SIZES = {
    "vocab_size": 330,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "initializer_range": 0.1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
PACKED: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama with llama3 positions": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        }
    },
    "mistral": {"sliding_window": None},
    "mixtral": EXPERTS,
    "qwen2": {},
    "qwen3": {},
    "qwen2_moe": {**EXPERTS, "shared_expert_intermediate_size": 32},
    "qwen3_moe": EXPERTS,
    "gemma": {},
    "phi3": {"sliding_window": None},
    "phi3 with longrope": {
        "sliding_window": None,
        "original_max_position_embeddings": 64,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": [1.0, 1.1, 1.2, 1.3, 1.5, 1.7, 2.0, 2.5],
            "long_factor": [2.0, 2.5, 3.0, 3.5, 4.0, 4.5, 5.0, 6.0],
            "original_max_position_embeddings": 64,
        },
    },
    "olmo": {},
    "olmo2": {},
    "smollm3": {},
    "granite": {"logits_scaling": 8.0, "attention_multiplier": 0.1, "residual_multiplier": 0.3},
    "granitemoe": {"logits_scaling": 8.0, "attention_multiplier": 0.1, **EXPERTS},
    "cohere": {"logit_scale": 0.25},
    "gpt_neox": {"rotary_pct": 0.5},
    "glm": {},
    "glm4": {},
    "starcoder2": {},
}
PADDED: dict[str, dict[str, Any]] = {
    "mistral with a window": {"sliding_window": 6},
    "phi3 with a window": {"sliding_window": 6},
    "qwen2 with a window": {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 2},
    "gemma2": {"sliding_window": 6, "final_logit_softcapping": 1.0, "attn_logit_softcapping": 0.5},
    "gemma3_text": {"sliding_window": 6},
    "gemma3": {"text_config": {**SIZES, "sliding_window": 6}, "vision_config": VISION},
    "cohere2": {"sliding_window": 6},
    "olmo3": {"sliding_window": 6},
    "gpt_oss": {**EXPERTS, "sliding_window": 6},
    "exaone4": {"sliding_window": 6},
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128},
    "phi": {},
    "stablelm": {},
    "nemotron": {},
    "falcon": {},
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 64},
    "bloom": {},
}
FAMILIES = {**PACKED, **PADDED}
TRAINED = [family for family in FAMILIES if family.split()[0] not in ("granite", "granitemoe", "cohere", "cohere2")]
"""The families for which transformers has a model with a score."""


def test_every_family_that_is_packed_is_checked_here() -> None:
    assert {family.split()[0] for family in PACKED} == set(SEGMENT_MODEL_TYPES)


def config_of(family: str) -> Any:
    model_type = family.split()[0]
    own = FAMILIES[family]
    sizes = {name: value for name, value in SIZES.items() if (model_type, name) != ("falcon", "head_dim")}
    sizes = {"pad_token_id": 0} if "text_config" in own else sizes
    return AutoConfig.for_model(model_type, **{**sizes, **own}, num_labels=1)


def groups_of(seed: int) -> list[TokenGroup]:
    rng = Random(seed)
    return [random_group(rng, num_completions=count) for count in (1, 2, 3)]


def rows_of(groups: list[TokenGroup]) -> list[tuple[int, Tensor]]:
    return [(len(g.prompt_ids), torch.tensor([g.prompt_ids + ids])) for g in groups for ids in g.completion_ids]


def with_clear_head(model: PreTrainedModel) -> PreTrainedModel:
    """Make one-dimensional weights (norms, biases, sinks) random too, so that a lost one is seen."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def assert_same_gradients(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        scale = float(gradient.abs().max())
        torch.testing.assert_close(
            actual[name],
            gradient,
            atol=1e-4 * max(scale, 1.0),
            rtol=1e-4,
            msg=lambda text, name=name: f"{name}: {text}",
        )


@pytest.mark.parametrize("family", FAMILIES)
def test_log_probabilities_and_gradients_of_a_policy_are_those_of_transformers_eager(family: str) -> None:
    torch.manual_seed(0)
    own = with_clear_head(AutoModelForCausalLM.from_config(config_of(family), attn_implementation="eager"))
    groups = groups_of(0)
    expected = torch.cat(
        [
            F.log_softmax(own(input_ids=row).logits[0, :-1].float() / 0.7, -1)
            .gather(1, row[0, 1:, None])[start - 1 :]
            .squeeze(1)
            for start, row in rows_of(groups)
        ]
    )
    ours = copy.deepcopy(own)
    layout = choose_layout(ours.config, CPU)
    assert layout is (Layout.SEGMENTS if family in PACKED else Layout.PADDED)
    logprobs, _ = PackedPolicy(ours, layout, temperature=0.7)(lay_out(groups, layout, pad_id=0))
    torch.testing.assert_close(logprobs, expected, atol=1e-4, rtol=0)
    weights = torch.randn(len(expected))
    assert_same_gradients(gradients_of(ours, (logprobs * weights).sum()), gradients_of(own, (expected * weights).sum()))


@pytest.mark.parametrize("family", TRAINED)
def test_scores_and_gradients_of_a_reward_model_are_those_of_transformers_eager(family: str) -> None:
    torch.manual_seed(0)
    own = with_clear_head(
        AutoModelForSequenceClassification.from_config(config_of(family), attn_implementation="eager")
    )
    groups = groups_of(1)
    expected = torch.cat([own(input_ids=row).logits[0] for _, row in rows_of(groups)])
    assert expected.std() > 0.05
    ours = copy.deepcopy(own)
    layout = choose_layout(ours.config, CPU)
    scores = PackedRewardModel(ours, layout)(lay_out(groups, layout, pad_id=0)).scores_N
    torch.testing.assert_close(scores, expected, atol=1e-4, rtol=0)
    if layout is Layout.SEGMENTS:
        with torch.no_grad():  # on CPUs, FlexAttention has no backward pass
            flex = PackedRewardModel(copy.deepcopy(own), Layout.FLEX)(lay_out(groups, Layout.FLEX, pad_id=0)).scores_N
        torch.testing.assert_close(flex, expected, atol=1e-4, rtol=0)
    weights = torch.randn(len(expected))
    assert_same_gradients(gradients_of(ours, (scores * weights).sum()), gradients_of(own, (expected * weights).sum()))
