"""Sizes of a decoder, and what follows from them: parameters, and bytes of a key-value cache.

L layers, H hidden, V vocabulary. Every family of packing.SEGMENT_MODEL_TYPES: rotary positions, gated feed-forward, RMS norms.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rm_robust.config.training import ModelConfig
from rm_robust.errors import ConfigError


@dataclass(frozen=True)
class ModelShape:
    """A decoder under a causal language model, or under a reward model's score head."""

    name: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    is_tied: bool
    """The output head is the embedding table."""
    has_qkv_bias: bool
    """Qwen2."""

    @property
    def query_width(self) -> int:
        return self.num_heads * self.head_size

    @property
    def kv_width(self) -> int:
        return self.num_kv_heads * self.head_size

    @property
    def matrix_parameters_per_layer(self) -> int:
        """Queries, keys, values, output; gate, up, down."""
        return (
            self.hidden_size * (2 * self.query_width + 2 * self.kv_width)
            + 3 * self.hidden_size * self.intermediate_size
        )

    @property
    def kv_parameters_per_layer(self) -> int:
        """Keys and values alone."""
        return 2 * self.hidden_size * self.kv_width

    @property
    def layer_parameters(self) -> int:
        """With two norms, and biases where there are any."""
        biases = self.query_width + 2 * self.kv_width if self.has_qkv_bias else 0
        return self.matrix_parameters_per_layer + biases + 2 * self.hidden_size

    @property
    def embedding_parameters(self) -> int:
        return self.vocab_size * self.hidden_size

    @property
    def policy_parameters(self) -> int:
        """Of the causal language model; a tied head counts once."""
        tables = self.embedding_parameters * (1 if self.is_tied else 2)
        return self.num_layers * self.layer_parameters + self.hidden_size + tables

    @property
    def reward_model_parameters(self) -> int:
        """The score head, H weights, in place of the output head."""
        return self.num_layers * self.layer_parameters + self.hidden_size + self.embedding_parameters + self.hidden_size

    def kv_cache_bytes_per_token(self, bytes_per_value: int) -> int:
        """A key and a value of every layer (Pope et al. 2022, "Efficiently scaling transformer inference", section 2)."""
        return 2 * self.num_layers * self.kv_width * bytes_per_value


def _llama(
    name: str, hidden: int, intermediate: int, layers: int, heads: int, head_size: int, *, is_tied: bool
) -> ModelShape:
    return ModelShape(name, 128_256, hidden, intermediate, layers, heads, 8, head_size, is_tied, has_qkv_bias=False)


def _qwen(name: str, hidden: int, intermediate: int, layers: int, heads: int) -> ModelShape:
    return ModelShape(name, 151_936, hidden, intermediate, layers, heads, 2, 128, is_tied=True, has_qkv_bias=True)


SHAPES = {
    shape.name.lower(): shape
    for shape in (
        _llama("Llama-3.2-1B", 2048, 8192, 16, 32, 64, is_tied=True),
        _llama("Llama-3.2-3B", 3072, 8192, 28, 24, 128, is_tied=True),
        _llama("Llama-3.1-8B", 4096, 14336, 32, 32, 128, is_tied=False),
        _llama("Llama-3.1-70B", 8192, 28672, 80, 64, 128, is_tied=False),
        _qwen("Qwen2.5-1.5B", 1536, 8960, 28, 12),
        _qwen("Qwen2.5-3B", 2048, 11008, 36, 16),
    )
}
"""By lower-case name. From the models' own config.json; tests/unit/research/scaling/test_scaling.py has their published totals."""


def shape_of_config(model: ModelConfig, *, vocab_size: int | None = None) -> ModelShape:
    """Of a model made from scratch (sft/from_scratch.py). `vocab_size`: of the tokenizer, which a small text leaves below the config's."""
    head_size = model.hidden_size // model.num_heads
    return ModelShape(
        "from scratch",
        model.vocab_size if vocab_size is None else vocab_size,
        model.hidden_size,
        model.intermediate_size,
        model.num_layers,
        model.num_heads,
        model.num_kv_heads,
        head_size,
        is_tied=True,
        has_qkv_bias=True,
    )


def shape_named(name: str) -> ModelShape:
    """A directory with a config.json, or the last part of a hub name or path that SHAPES knows ("…-Instruct" is the same shape). ConfigError otherwise."""
    config_path = Path(name) / "config.json"
    if config_path.is_file():
        return _shape_of_hugging_face(name, json.loads(config_path.read_text()))
    known = SHAPES.get(name.rstrip("/").split("/")[-1].lower().removesuffix("-instruct"))
    if known is None:
        shapes = ", ".join(shape.name for shape in SHAPES.values())
        raise ConfigError(
            f"No sizes are known of the model {name!r}: it is no directory with a config.json, and none of {shapes}. Name one of those."
        )
    return known


def _shape_of_hugging_face(name: str, config: dict[str, Any]) -> ModelShape:
    heads = config["num_attention_heads"]
    return ModelShape(
        name,
        config["vocab_size"],
        config["hidden_size"],
        config["intermediate_size"],
        config["num_hidden_layers"],
        heads,
        config.get("num_key_value_heads") or heads,
        config.get("head_dim") or config["hidden_size"] // heads,
        is_tied=config["tie_word_embeddings"],
        has_qkv_bias=config["model_type"] == "qwen2",
    )
