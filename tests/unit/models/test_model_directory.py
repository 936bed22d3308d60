"""A directory that cannot be trained is refused in one line, before any weight is read."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, GPT2Config, LlamaConfig, PretrainedConfig, T5Config

from rm_robust.data.chat import ChatFormat
from rm_robust.errors import CheckpointError, RmRobustError
from rm_robust.models.model_directory import check_language_model, unmatched_targets
from tests.support.tiny_models import save_tiny_language_model

LABEL = "model.path = mine"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_language_model(tmp_path_factory.mktemp("models") / "whole")


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "mine"))


def edit_config(folder: Path, **values: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def add_a_token(folder: Path) -> None:
    chat = ChatFormat.load(folder)
    chat.tokenizer.add_tokens(["<|new|>"])
    chat.tokenizer.save_pretrained(str(folder))


def make_adapter(folder: Path) -> None:
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "owner/base"}))


def cut_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def shard_that_is_missing(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def replace_config(folder: Path, config: PretrainedConfig) -> None:
    config.save_pretrained(folder)


FAULTS: dict[str, tuple[Callable[[Path], None], str]] = {
    "adapter": (make_adapter, "holds an adapter, not a whole model. Name its base, owner/base, or merge it"),
    "GPTQ": (lambda f: edit_config(f, quantization_config={"quant_method": "gptq"}), r"is quantised \(gptq\)"),
    "unknown architecture": (lambda f: edit_config(f, model_type="nobody"), "that transformers cannot read"),
    "encoder": (lambda f: replace_config(f, BertConfig(architectures=["BertForMaskedLM"])), "is an encoder"),
    "encoder and decoder": (lambda f: replace_config(f, T5Config()), "a model of an encoder and a decoder"),
    "vision": (
        lambda f: edit_config(f, vision_config={}, architectures=["XForConditionalGeneration"]),
        "more than text",
    ),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "holds no weights"),
    "truncated": (cut_weights, "model.safetensors .* is damaged or truncated"),
    "missing shard": (shard_that_is_missing, "lacks 1 of its 1 weight files"),
    "untied output lost": (lambda f: edit_config(f, tie_word_embeddings=False), "its output layer would be random"),
    "token beyond the embedding": (add_a_token, r"its tokenizer has 1 tokens beyond it .*resize_token_embeddings"),
    "pad id beyond the embedding": (lambda f: edit_config(f, pad_token_id=10**6), "pad_token_id = 1000000"),
    "other vocabulary size": (lambda f: edit_config(f, vocab_size=7), "Save model and config together"),
    "int8 weights": (
        lambda f: edit_weights(f, lambda t: t.update({"model.norm.weight": t["model.norm.weight"].to(torch.int8)})),
        "has weights in I8",
    ),
}


def test_a_whole_model_passes(whole: Path) -> None:
    config = check_language_model(whole, LABEL, load_chat=ChatFormat.load, is_policy=True)
    assert config.model_type == "qwen2"


@pytest.mark.parametrize("fault", FAULTS)
def test_a_directory_that_cannot_be_trained_is_refused_in_one_line(folder: Path, fault: str) -> None:
    spoil, message = FAULTS[fault]
    spoil(folder)
    with pytest.raises(CheckpointError, match=message) as error:
        check_language_model(folder, LABEL, load_chat=ChatFormat.load, is_policy=True)
    assert str(error.value).startswith(LABEL)
    assert "\n" not in str(error.value)


def test_the_advice_for_a_token_beyond_the_embedding_works(folder: Path, tmp_path: Path) -> None:
    """The advice's command is followed here as it is printed, in Python."""
    add_a_token(folder)
    with pytest.raises(RmRobustError) as error:
        check_language_model(folder, LABEL, load_chat=ChatFormat.load, is_policy=True)
    program = str(error.value).split('python -c "')[1].split('"')[0]
    resized = tmp_path / "RESIZED"
    exec(program.replace("'RESIZED'", f"'{resized}'"))
    check_language_model(resized, LABEL, load_chat=ChatFormat.load, is_policy=True)


@pytest.mark.parametrize(
    ("config", "targets", "expected"),
    [
        (LlamaConfig(num_hidden_layers=1), ["q_proj", "c_attn"], ["c_attn"]),
        (LlamaConfig(num_hidden_layers=1), ["self_attn.q_proj"], []),
        (GPT2Config(n_layer=1), ["q_proj", "c_attn"], ["q_proj"]),
    ],
)
def test_names_of_adapted_layers_that_no_layer_has_are_found(
    config: PretrainedConfig, targets: list[str], expected: list[str]
) -> None:
    assert unmatched_targets(config, targets)[0] == expected
