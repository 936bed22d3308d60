"""Sizes of a decoder, and what follows from them: its parameters, and the bytes of its key-value cache.

L layers, H hidden, V vocabulary. The formulas hold for every family of SEGMENT_MODEL_TYPES
(rm_robust/models/packing.py): rotary positions, gated feed-forward, RMS norms.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rm_robust.config.training import ModelConfig
from rm_robust.errors import ConfigError


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a decoder below a language-model head or below a reward model's score head."""

    name: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    is_tied: bool
    """Whether the output head is the embedding table."""
    has_qkv_bias: bool
    """Whether queries, keys and values have biases, as in Qwen2."""

    @property
    def query_width(self) -> int:
        return self.num_heads * self.head_size

    @property
    def kv_width(self) -> int:
        return self.num_kv_heads * self.head_size

    @property
    def matrix_parameters_per_layer(self) -> int:
        """Parameters of a layer's matrices: queries, keys, values and output, and gate, up and down."""
        return (
            self.hidden_size * (2 * self.query_width + 2 * self.kv_width)
            + 3 * self.hidden_size * self.intermediate_size
        )

    @property
    def kv_parameters_per_layer(self) -> int:
        """Parameters of a layer's matrices for keys and values."""
        return 2 * self.hidden_size * self.kv_width

    @property
    def layer_parameters(self) -> int:
        """Parameters of a layer: its matrices, two norms, and biases if there are any."""
        biases = self.query_width + 2 * self.kv_width if self.has_qkv_bias else 0
        return self.matrix_parameters_per_layer + biases + 2 * self.hidden_size

    @property
    def embedding_parameters(self) -> int:
        return self.vocab_size * self.hidden_size

    @property
    def policy_parameters(self) -> int:
        """Parameters of the causal language model. A tied head counts once."""
        tables = self.embedding_parameters * (1 if self.is_tied else 2)
        return self.num_layers * self.layer_parameters + self.hidden_size + tables

    @property
    def reward_model_parameters(self) -> int:
        """Parameters of the reward model, which has a score head of H weights in place of the output head."""
        return self.num_layers * self.layer_parameters + self.hidden_size + self.embedding_parameters + self.hidden_size

    def kv_cache_bytes_per_token(self, bytes_per_value: int) -> int:
        """Return the bytes of a token's key and value in every layer.

        The source is Pope et al. 2022, "Efficiently scaling transformer inference", section 2.
        """
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
"""The shapes of known models by lower-case name, from the models' own config.json.

tests/unit/research/scaling/test_scaling.py compares them with the published numbers of parameters.
"""


def shape_of_config(model: ModelConfig, *, vocab_size: int | None = None) -> ModelShape:
    """Return the shape of a model that is trained from scratch (save_base_model in rm_robust/data/demonstrations.py).

    `vocab_size` is the tokenizer's, which is below the config's if the text is small.
    """
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
    """Return the shape of a directory with a config.json, or of a hub name or path whose last part SHAPES knows.

    An "…-Instruct" model has the same shape. Raises ConfigError if the sizes are not known.
    """
    config_path = Path(name) / "config.json"
    if config_path.is_file():
        return _shape_of_hugging_face(name, json.loads(config_path.read_text()))
    known = SHAPES.get(name.rstrip("/").split("/")[-1].lower().removesuffix("-instruct"))
    if known is None:
        shapes = ", ".join(shape.name for shape in SHAPES.values())
        raise ConfigError(
            f"The sizes of the model {name!r} are not known: it is no directory with a config.json, "
            f"and none of {shapes}. Name one of those."
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
