"""The forward that only scores against the whole one, for every family that it takes apart."""

import copy

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForSequenceClassification,
    MistralConfig,
    MistralForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForSequenceClassification,
    Qwen3Config,
    Qwen3ForSequenceClassification,
)

from rm_robust.packing import SEGMENT_MODEL_TYPES, Layout, lay_out
from rm_robust.records import TokenGroup
from rm_robust.reward_model.model import PackedRewardModel
from rm_robust.reward_model.scoring_forward import ScoringForward

SHAPE = {"hidden_size": 48, "intermediate_size": 80, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 90, "initializer_range": 0.3}
FAMILIES: dict[str, tuple[type[PretrainedConfig], type[PreTrainedModel], dict[str, object]]] = {
    "qwen2": (Qwen2Config, Qwen2ForSequenceClassification, {}),
    "qwen3": (Qwen3Config, Qwen3ForSequenceClassification, {"head_dim": 16}),
    "llama": (LlamaConfig, LlamaForSequenceClassification, {"attention_bias": True, "mlp_bias": True}),
    "mistral": (MistralConfig, MistralForSequenceClassification, {"sliding_window": None}),
}


def random_model(family: str, *, num_layers: int) -> PackedRewardModel:
    torch.manual_seed(0)
    config, model, own = FAMILIES[family]
    made = model(config(**SHAPE, **own, num_hidden_layers=num_layers, num_labels=1, pad_token_id=0)).eval()
    for name, weight in made.named_parameters():  # norms and biases begin as ones and zeros, which hide mistakes
        if weight.dim() == 1:
            torch.nn.init.normal_(weight, mean=1.0 if "norm" in name else 0.0, std=0.3)
    return PackedRewardModel(made, Layout.SEGMENTS).eval()


def random_groups() -> list[TokenGroup]:
    generator = torch.Generator().manual_seed(1)

    def ids(length: int) -> list[int]:
        return torch.randint(1, 90, (length,), generator=generator).tolist()

    shapes = [(5, [3, 9, 1]), (30, [2]), (1, [1, 1]), (12, [40, 4, 7, 2])]
    return [TokenGroup(ids(prompt), [ids(length) for length in completions]) for prompt, completions in shapes]


def test_every_family_that_has_segments_is_checked() -> None:
    assert set(FAMILIES) == set(SEGMENT_MODEL_TYPES)


@pytest.mark.parametrize("num_layers", [1, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_scores_and_hidden_states_are_those_of_the_whole_forward(family: str, num_layers: int) -> None:
    whole = random_model(family, num_layers=num_layers)
    batch = lay_out(random_groups(), Layout.SEGMENTS, pad_id=0)
    with torch.inference_mode():
        expected = whole(batch)
        found = ScoringForward(copy.deepcopy(whole))(batch)
    assert expected.scores_N.std() > 0.3
    for name in ("scores_N", "hidden_before_final_norm_NH", "hidden_after_final_norm_NH"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), atol=5e-5, rtol=1e-5)
