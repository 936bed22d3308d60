"""Compute the decoder's last layer at the scored columns alone: the same scores and gradients with less work.

Training, evaluation and serving on CPUs use it. A score is read at one column of each completion. Except for keys and
values, the last layer is needed there only: one query, one attention row and one MLP row for each completion instead of
one for each token. This saves almost half of the arithmetic in a model of two layers, and a thirtieth in one of thirty.

It is speed work for CPUs only (Layout.SEGMENTS); other layouts run the whole layer. It repeats the decoder layer of
transformers and relies on names that transformers does not promise:
  - the backbone's `layers`, and that it hands keyword arguments that it does not know to every one of them;
  - the layer's `input_layernorm`, `self_attn`, `post_attention_layernorm` and `mlp`, and its argument
    `position_embeddings`;
  - the attention's `q_proj`, `k_proj`, `v_proj`, `o_proj`, `head_dim` and `scaling`, and for Qwen 3 its `q_norm` and
    `k_norm`;
  - `rotate_half` of modeling_llama.
When a version of transformers changes them, tests/unit/models/test_last_layer.py fails: it compares every family of
decoders with the whole layer.

Shapes: T columns of a packed row, N completions, H hidden, D of a head.
"""

from types import MethodType
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import rotate_half

from rm_robust.models.attention import Segment, attend, last_columns

LAST_LAYER_MODEL_TYPES = ("qwen2", "qwen3", "llama", "mistral", "mixtral", "qwen2_moe", "qwen3_moe", "gemma")
"""The decoder families whose layer is the one that `scored_columns` repeats."""


def compute_last_layer_at_scored_columns(backbone: PreTrainedModel) -> None:
    """Make the last layer return [1, N, H] in a forward pass that gives its layers `scored_index_N`.

    Other passes stay as they are. `backbone` must be of LAST_LAYER_MODEL_TYPES and run Layout.SEGMENTS. The
    layer keeps the names of its weights, its hooks and its type, so that checkpoints, FSDP2, ZeRO-3, adapters and
    gradient checkpointing find what they look for.
    """
    layers: Any = backbone.layers
    layers[-1].forward = MethodType(_forward, layers[-1])


def _forward(layer: Any, hidden_states: Tensor, **arguments: Any) -> Tensor:
    """Take the place of the layer's forward, with the arguments that transformers gives to a decoder layer."""
    if "scored_index_N" in arguments:
        return scored_columns(layer, hidden_states, **arguments)
    output_1TH: Tensor = type(layer).forward(layer, hidden_states, **arguments)
    return output_1TH


def scored_columns(
    layer: Any,
    hidden_1TH: Tensor,
    *,
    scored_index_N: Tensor,
    segments: tuple[Segment, ...],
    position_embeddings: tuple[Tensor, Tensor],
    **_: object,
) -> Tensor:
    """Return the layer's output at the last column of each segment, [1, N, H].

    Every weight is used by calling its module.
    """
    attention = layer.self_attn
    normed_1TH = layer.input_layernorm(hidden_1TH)

    def heads(projection: Any, states_1TH: Tensor) -> Tensor:
        split: Tensor = projection(states_1TH).unflatten(-1, (-1, attention.head_dim))
        return split

    query, key, value = (
        heads(attention.q_proj, normed_1TH[:, scored_index_N]),
        heads(attention.k_proj, normed_1TH),
        heads(attention.v_proj, normed_1TH),
    )
    if hasattr(attention, "q_norm"):  # Qwen 3
        query, key = attention.q_norm(query), attention.k_norm(key)
    cos, sin = position_embeddings
    query, key = rotated(query, cos[:, scored_index_N], sin[:, scored_index_N]), rotated(key, cos, sin)
    query, key, value = (part.transpose(1, 2) for part in (query, key, value))
    attended = attend(query, key, value, segments, last_columns(segments), scale=attention.scaling)
    residual_1NH = hidden_1TH[:, scored_index_N] + attention.o_proj(attended.flatten(2))
    output_1NH: Tensor = residual_1NH + layer.mlp(layer.post_attention_layernorm(residual_1NH))
    return output_1NH


def rotated(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return [1, columns, heads, D] with rotary positions applied."""
    turned: Tensor = heads * cos.unsqueeze(2) + rotate_half(heads) * sin.unsqueeze(2)
    return turned
