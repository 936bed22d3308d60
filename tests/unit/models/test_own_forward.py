"""The check at load passes a model that we compute as transformers does, and refuses one that we do not."""

from types import MethodType
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

from rm_robust.data.chat import ChatFormat
from rm_robust.data.records import TokenGroup
from rm_robust.errors import CheckpointError
from rm_robust.models import own_forward
from rm_robust.models.own_forward import check_policy, check_reward_model
from rm_robust.models.packing import Layout, PackedBatch, choose_layout, hidden_states, lay_out
from rm_robust.models.policy import PackedPolicy
from rm_robust.models.reward_model import PackedRewardModel
from tests.support.tiny_models import tiny_tokenizer

CHAT = ChatFormat(tiny_tokenizer(), source="tiny")
DTYPES = (torch.float32, torch.bfloat16)


def config_of(family: str, **own: object) -> Any:
    sizes = {
        "vocab_size": 330,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "initializer_range": 0.1,
        "pad_token_id": 0,
    }
    return AutoConfig.for_model(family, **sizes, **own, num_labels=1)


def reward_model(family: str = "llama", *, dtype: torch.dtype = torch.float32, **own: object) -> PreTrainedModel:
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForSequenceClassification.from_config(config_of(family, **own)).to(dtype)
    return model.eval()


def policy(family: str = "llama", *, dtype: torch.dtype = torch.float32, **own: object) -> PreTrainedModel:
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config_of(family, **own)).to(dtype)
    return model.eval()


def packed_policy(model: PreTrainedModel) -> PackedPolicy:
    return PackedPolicy(model, choose_layout(model.config, model.device), temperature=1.0)


def packed_reward_model(model: PreTrainedModel) -> PackedRewardModel:
    return PackedRewardModel(model, choose_layout(model.config, model.device))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gemma3_text"])
def test_models_that_we_compute_as_transformers_does_pass(family: str, dtype: torch.dtype) -> None:
    check_reward_model(packed_reward_model(reward_model(family, dtype=dtype)), CHAT)
    check_policy(packed_policy(policy(family, dtype=dtype)), CHAT)


def test_the_check_leaves_the_layout_as_it_was() -> None:
    packed = packed_reward_model(reward_model())
    check_reward_model(packed, CHAT)
    assert packed.backbone.config._attn_implementation == Layout.SEGMENTS


def scale_own_attention(model: PreTrainedModel, *, layer: int, factor: float) -> None:
    """Make a layer's attention scale its output, but only where it runs with transformers' eager attention."""
    attention: Any = model.base_model.get_submodule(f"layers.{layer}.self_attn")
    inner = type(attention).forward

    def forward(self: Any, *inputs: Any, **arguments: Any) -> tuple[Tensor, Tensor]:
        output, weights = inner(self, *inputs, **arguments)
        return (factor * output if self.config._attn_implementation == "eager" else output), weights

    attention.forward = MethodType(forward, attention)


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_altered_attention_is_refused_and_its_layer_is_named(dtype: torch.dtype) -> None:
    altered = reward_model(dtype=dtype)
    scale_own_attention(altered, layer=1, factor=1.01 if dtype is torch.float32 else 2.0)
    with pytest.raises(CheckpointError, match=r"gets other scores .* first difference is in layers\.1 \(LlamaDecoder"):
        check_reward_model(packed_reward_model(altered), CHAT)
    altered = policy(dtype=dtype)
    scale_own_attention(altered, layer=1, factor=1.01 if dtype is torch.float32 else 2.0)
    with pytest.raises(CheckpointError, match=r"gets other logits .* first difference is in layers\.1 \(LlamaDecoder"):
        check_policy(packed_policy(altered), CHAT)


def test_an_altered_score_head_is_refused() -> None:
    altered: Any = reward_model()
    inner = type(altered).forward

    def forward(self: Any, *inputs: Any, **arguments: Any) -> Any:
        output = inner(self, *inputs, **arguments)
        output.logits = torch.tanh(output.logits)
        return output

    altered.forward = MethodType(forward, altered)
    with pytest.raises(CheckpointError, match="gets other scores .* first difference is in the head"):
        check_reward_model(packed_reward_model(altered), CHAT)


@pytest.mark.parametrize(
    ("family", "own"),
    [
        ("granite", {"logits_scaling": 8.0}),
        ("cohere", {"logit_scale": 0.1}),
        ("gemma2", {"final_logit_softcapping": 1.0}),
    ],
)
def test_output_embeddings_alone_are_refused_where_the_model_does_more(
    family: str, own: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    def embeddings_alone(model: PreTrainedModel, batch: PackedBatch) -> Tensor:
        hidden_TH = hidden_states(model.base_model, batch)
        logits_MV: Tensor = model.get_output_embeddings()(hidden_TH[batch.predictor_index_M])
        return logits_MV

    check_policy(packed_policy(policy(family, **own)), CHAT)
    monkeypatch.setattr(own_forward, "completion_logits", embeddings_alone)
    with pytest.raises(CheckpointError, match="gets other logits .* first difference is in the head"):
        check_policy(packed_policy(policy(family, **own)), CHAT)


def test_lost_attention_softcapping_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    packed = packed_reward_model(reward_model("gemma2", attn_logit_softcapping=0.1))
    check_reward_model(packed, CHAT)
    monkeypatch.setattr(own_forward, "prepare_backbone", lambda backbone, _: backbone.set_attn_implementation("sdpa"))
    with pytest.raises(CheckpointError, match=r"gets other scores .* first difference is in layers\.0 \(Gemma2"):
        check_reward_model(packed, CHAT)


def test_a_decoder_without_a_known_final_norm_is_refused_before_its_first_batch() -> None:
    model: Any = reward_model()
    model.model.last_norm = model.model.norm
    del model.model.norm
    with pytest.raises(CheckpointError, match="LlamaModel has no final norm under a known name"):
        PackedRewardModel(model, Layout.PADDED)


def test_sft_of_granite_begins_at_the_models_own_loss() -> None:
    model = policy("granite", logits_scaling=8.0)
    group = own_forward.probe_conversation(CHAT)
    row = torch.tensor([group.prompt_ids + group.completion_ids[0]])
    labels = row.clone()
    labels[:, : len(group.prompt_ids)] = -100
    own_loss = float(model(input_ids=row, labels=labels).loss)
    packed = packed_policy(model)
    single = TokenGroup(group.prompt_ids, group.completion_ids[:1])
    logprobs_M, _ = packed(lay_out([single], packed.layout, pad_id=0))
    assert float(-logprobs_M.mean()) == pytest.approx(own_loss, abs=1e-4)
