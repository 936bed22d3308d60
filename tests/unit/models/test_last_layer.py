"""The last layer at the scored columns alone equals the whole layer, for every family that has it."""

import copy

import pytest
import torch
from transformers import (
    GemmaConfig,
    GemmaForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    MistralConfig,
    MistralForSequenceClassification,
    MixtralConfig,
    MixtralForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForSequenceClassification,
    Qwen2MoeConfig,
    Qwen2MoeForSequenceClassification,
    Qwen3Config,
    Qwen3ForSequenceClassification,
    Qwen3MoeConfig,
    Qwen3MoeForSequenceClassification,
)

from rm_robust.data.records import TokenGroup
from rm_robust.models.last_layer import LAST_LAYER_MODEL_TYPES
from rm_robust.models.packing import Layout, lay_out
from rm_robust.models.reward_model import PackedRewardModel, ScoredBatch

SHAPE = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 90,
    "initializer_range": 0.3,
}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32, "initializer_range": 0.15}
FAMILIES: dict[str, tuple[type[PretrainedConfig], type[PreTrainedModel], dict[str, object]]] = {
    "qwen2": (Qwen2Config, Qwen2ForSequenceClassification, {}),
    "qwen3": (Qwen3Config, Qwen3ForSequenceClassification, {"head_dim": 16}),
    "llama": (LlamaConfig, LlamaForSequenceClassification, {"attention_bias": True, "mlp_bias": True}),
    "mistral": (MistralConfig, MistralForSequenceClassification, {"sliding_window": None}),
    "mixtral": (
        MixtralConfig,
        MixtralForSequenceClassification,
        {**EXPERTS, "num_local_experts": 4, "sliding_window": None},
    ),
    "qwen2_moe": (Qwen2MoeConfig, Qwen2MoeForSequenceClassification, {**EXPERTS, "num_experts": 4}),
    "qwen3_moe": (Qwen3MoeConfig, Qwen3MoeForSequenceClassification, {**EXPERTS, "num_experts": 4}),
    "gemma": (GemmaConfig, GemmaForSequenceClassification, {"head_dim": 12, "initializer_range": 0.15}),
}


def random_model(family: str, *, num_layers: int) -> PreTrainedModel:
    torch.manual_seed(0)
    config_type, model_type, settings = FAMILIES[family]
    config = config_type(**{**SHAPE, **settings}, num_hidden_layers=num_layers, num_labels=1, pad_token_id=0)
    model = model_type(config).eval()
    for name, weight in model.named_parameters():  # norms and biases begin as ones and zeros, which hide mistakes
        if weight.dim() == 1:
            torch.nn.init.normal_(weight, mean=1.0 if "norm" in name else 0.0, std=0.3)
    return model


def random_groups() -> list[TokenGroup]:
    generator = torch.Generator().manual_seed(1)

    def ids(length: int) -> list[int]:
        return torch.randint(1, 90, (length,), generator=generator).tolist()

    shapes = [(5, [3, 9, 1]), (30, [2]), (1, [1, 1]), (12, [40, 4, 7, 2])]
    return [TokenGroup(ids(prompt), [ids(length) for length in completions]) for prompt, completions in shapes]


def test_every_family_that_has_this_last_layer_is_checked() -> None:
    assert set(FAMILIES) == set(LAST_LAYER_MODEL_TYPES)


def scored_with_gradients(model: PreTrainedModel, layout: Layout) -> tuple[ScoredBatch, dict[str, torch.Tensor]]:
    packed = PackedRewardModel(model, layout)
    scored = packed(lay_out(random_groups(), layout, pad_id=0))
    weights_N = torch.linspace(-1, 2, len(scored.scores_N))
    (scored.scores_N * weights_N).sum().backward()
    return scored, {name: weight.grad for name, weight in packed.named_parameters() if weight.grad is not None}


@pytest.mark.parametrize("num_layers", [1, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_scores_hidden_states_and_gradients_are_those_of_padded_rows_through_the_whole_layer(
    family: str, num_layers: int
) -> None:
    model = random_model(family, num_layers=num_layers)
    expected, expected_gradients = scored_with_gradients(copy.deepcopy(model), Layout.PADDED)
    scored, gradients = scored_with_gradients(model, Layout.SEGMENTS)
    assert expected.scores_N.std() > 0.3
    for name in ("scores_N", "hidden_before_final_norm_NH", "hidden_after_final_norm_NH"):
        torch.testing.assert_close(getattr(scored, name), getattr(expected, name), atol=5e-5, rtol=1e-5)
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in expected_gradients.items():
        assert (gradients[name] - gradient).norm() < 1e-5 * gradient.norm() + 1e-6, name


def test_the_last_layer_computes_one_row_a_completion_and_the_others_one_a_token() -> None:
    model = random_model("qwen2", num_layers=2)
    rows: list[int] = []
    for layer in model.model.layers:
        layer.mlp.register_forward_pre_hook(lambda _, inputs: rows.append(inputs[0].flatten(0, -2).shape[0]))
    batch = lay_out(random_groups(), Layout.SEGMENTS, pad_id=0)
    PackedRewardModel(model, Layout.SEGMENTS)(batch)
    assert rows == [batch.num_tokens, len(batch.scored_index_N)]


def test_a_pass_that_names_no_scored_columns_goes_through_the_whole_layer_also_in_a_copy() -> None:
    model = random_model("llama", num_layers=2)
    ids_1T = torch.tensor([[5, 6, 7, 8]])
    expected = model.model(input_ids=ids_1T).last_hidden_state
    PackedRewardModel(model, Layout.SEGMENTS)
    model.model.config._attn_implementation = "sdpa"
    for same_model in (model, copy.deepcopy(model)):
        assert torch.equal(same_model.model(input_ids=ids_1T).last_hidden_state, expected)
    twin = copy.deepcopy(model)
    torch.nn.init.zeros_(twin.model.layers[-1].mlp.down_proj.weight)  # the copy's layer is its own
    assert torch.equal(model.model(input_ids=ids_1T).last_hidden_state, expected)
    assert not torch.equal(twin.model(input_ids=ids_1T).last_hidden_state, expected)
