"""Tiny random models for tests: the architectures are real, and the same seed gives the same weights."""

import json
from pathlib import Path
from random import Random

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2ForSequenceClassification,
)

from rm_robust.config.training import ModelConfig
from rm_robust.data.chat import ChatFormat
from rm_robust.data.demonstrations import make_tokenizer, save_base_model
from rm_robust.data.records import TokenGroup
from rm_robust.data.rows import RowKind
from rm_robust.data.token_files import TOKEN_SCHEMA
from rm_robust.data.token_rows import STAGED_SCHEMA, TokenLimits, tokenise_text
from rm_robust.models.packing import Layout

VOCABULARY_SIZE = 512
TRAINED_ON_CPU = (Layout.SEGMENTS, Layout.PADDED)
"""The layouts in which a model can be trained on a CPU, where torch's FlexAttention has no backward pass."""


def tiny_qwen2_config(*, tie_word_embeddings: bool) -> Qwen2Config:
    """Return a config of about 0.3 M parameters. Its heads have 32 dimensions, the fewest that vLLM takes on CPU."""
    return Qwen2Config(
        vocab_size=VOCABULARY_SIZE,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=tie_word_embeddings,
        initializer_range=0.08,  # large enough that greedy continuations depend on the prompt
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )


def sized_qwen2_config(size: str, *, tie_word_embeddings: bool) -> Qwen2Config:
    """Return the config of a policy whose weight updates are tested and measured.

    With tied embeddings it has as many parameters as `size` says; without, it has an output head in addition.
    """
    if size == "0.3 M":
        return tiny_qwen2_config(tie_word_embeddings=tie_word_embeddings)
    hidden_size, num_layers, vocabulary_size = {"20 M": (384, 6, 16384), "100 M": (768, 8, 32768)}[size]
    return Qwen2Config(
        vocab_size=vocabulary_size,
        hidden_size=hidden_size,
        intermediate_size=4 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=hidden_size // 64,
        num_key_value_heads=hidden_size // 64,
        max_position_embeddings=1024,
        tie_word_embeddings=tie_word_embeddings,
        initializer_range=0.04,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )


def save_qwen2(directory: Path, config: Qwen2Config, *, seed: int = 0) -> Path:
    """Save a random causal LM as a Hugging Face directory without a tokenizer."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Qwen2ForCausalLM(config)
    model.save_pretrained(directory)
    return directory


def save_tiny_qwen2(directory: Path, *, tie_word_embeddings: bool, seed: int = 0) -> Path:
    """Save a random causal LM of about 0.3 M parameters with `save_qwen2`."""
    return save_qwen2(directory, tiny_qwen2_config(tie_word_embeddings=tie_word_embeddings), seed=seed)


TEXT = (
    "Order these words: red, green, blue.\n"
    "Which of them is first? The answer is not seven apples by the quiet river, please."
)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Return a byte-level ChatML tokenizer with some merges. Its ids are pad 0, turn start 1 and turn end 2."""
    return make_tokenizer([TEXT] * 20, vocab_size=330)


def random_group(
    rng: Random, *, num_completions: int, max_prompt_tokens: int = 12, max_completion_tokens: int = 9
) -> TokenGroup:
    """Return a group with random lengths of at least 1 and random ids, for any tiny model.

    The ids are at least 3, because smaller ones are special tokens.
    """

    def ids(longest: int) -> list[int]:
        return [rng.randrange(3, 300) for _ in range(rng.randint(1, longest))]

    return TokenGroup(ids(max_prompt_tokens), [ids(max_completion_tokens) for _ in range(num_completions)])


def tiny_reward_model(*, seed: int = 0, num_positions: int = 128) -> Qwen2ForSequenceClassification:
    """Return a random reward model whose scores differ clearly between token groups: they are about N(0, 1)."""
    config = Qwen2Config(
        vocab_size=330,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=num_positions,
        initializer_range=0.1,
        bos_token_id=None,
        eos_token_id=2,
        pad_token_id=0,
    )
    config.num_labels = 1
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Qwen2ForSequenceClassification(config)


def gradients_of(model: PreTrainedModel, loss: Tensor) -> dict[str, Tensor]:
    """Return the gradient of `loss` for every parameter that has one."""
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def save_tiny_language_model(folder: Path, *, seed: int = 0, num_positions: int = 128) -> Path:
    """Save a random causal LM with tied embeddings and its tokenizer as a Hugging Face directory.

    SFT can start from it, and it can be RLOO's policy.
    """
    config = ModelConfig(
        hidden_size=32,
        intermediate_size=64,
        num_layers=2,
        num_heads=1,
        num_kv_heads=1,
        max_position_embeddings=num_positions,
    )
    with torch.random.fork_rng():
        save_base_model(folder, config, tiny_tokenizer(), seed=seed)
    return folder


def write_token_groups(folder: Path, rows: list[dict[str, object]], *, kind: RowKind, chat: ChatFormat) -> None:
    """Write tokenised rows as the data pipeline commits them for one scenario.

    `rows` are as in a user's file, and none of them may be dropped.
    """
    limits = TokenLimits(max_prompt_tokens=100, max_completion_tokens=100, max_dropped_fraction=0)
    tokenised = [
        token_row
        for row in rows
        for token_row in tokenise_text(json.dumps(row), scenario=folder.name, kind=kind, chat=chat, limits=limits)
    ]
    assert not any(row["drop_reason"] for row in tokenised), tokenised
    folder.mkdir(parents=True)
    pq.write_table(
        pa.Table.from_pylist(tokenised, schema=STAGED_SCHEMA).select(TOKEN_SCHEMA.names), folder / "part-00000.parquet"
    )
