"""Policies load whole or not at all, and come back from a commit as plain transformers models."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from rm_robust.config.shared import OptimizerConfig
from rm_robust.data.chat import ChatFormat
from rm_robust.errors import CheckpointError
from rm_robust.models.checkpoint import verify_checkpoint
from rm_robust.models.packing import Layout
from rm_robust.models.policy import PackedPolicy, commit_policy, load_policy
from rm_robust.training.engines.ddp import DdpEngine
from tests.support.tiny_models import save_tiny_language_model, save_tiny_qwen2, tiny_tokenizer


@pytest.mark.parametrize("tie_word_embeddings", [True, False])
def test_a_committed_policy_loads_with_the_trained_weights(tmp_path: Path, tie_word_embeddings: bool) -> None:
    base = save_tiny_qwen2(tmp_path / "base", tie_word_embeddings=tie_word_embeddings)
    model = load_policy(base, dtype=torch.float32)
    engine = DdpEngine(
        PackedPolicy(model, Layout.SEGMENTS, temperature=1.0), optimizer=OptimizerConfig(), device=torch.device("cpu")
    )
    with torch.no_grad():
        model.get_output_embeddings().weight.add_(1)
    chat = ChatFormat(tiny_tokenizer(), source="tiny")
    commit_policy(tmp_path / "policy", model, engine.full_state_dict(), chat, training={"stage": "sft"})
    assert verify_checkpoint(tmp_path / "policy", "policy").template_sha256 == chat.template_sha256
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "policy")
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert (loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight) == tie_word_embeddings
    assert "segments" not in (tmp_path / "policy" / "config.json").read_text()


def test_a_policy_with_a_missing_weight_is_refused_by_its_name(tmp_path: Path) -> None:
    path = save_tiny_language_model(tmp_path / "base") / "model.safetensors"
    state = load_file(path)
    del state["model.norm.weight"]
    save_file(state, path, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight"):
        load_policy(tmp_path / "base", dtype=torch.float32)


def test_a_tied_output_embedding_that_no_file_holds_is_not_missing(tmp_path: Path) -> None:
    folder = save_tiny_language_model(tmp_path / "base")
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    assert load_policy(folder, dtype=torch.float32).num_parameters() > 0
