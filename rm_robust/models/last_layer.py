"""The decoder's last layer at the scored columns alone: the same scores and gradients with less work, in training, evaluation and serving on CPUs.

A score is read at one column a completion. Of the last layer everything but keys and values is needed there only: a query, an attention row and an MLP
row a completion instead of one a token. In a model of two layers that is almost half of the arithmetic, in one of thirty a thirtieth.

Shapes: T columns of a packed row, N completions, H hidden, D of a head.
"""

from types import MethodType
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import rotate_half

from rm_robust.models.attention import Segment, attend, last_columns


def compute_last_layer_at_scored_columns(backbone: PreTrainedModel) -> None:
    """Let the last layer return [1, N, H] where a forward pass gives its layers `scored_index_N`; any other pass is as before.

    For the decoders that have segments (packing.SEGMENT_MODEL_TYPES). The layer keeps its weights' names, hooks and type, so that checkpoints, FSDP2,
    ZeRO-3, adapters and gradient checkpointing find what they look for.
    """
    layers: Any = backbone.layers
    layers[-1].forward = MethodType(_forward, layers[-1])


def _forward(layer: Any, hidden_states: Tensor, **arguments: Any) -> Tensor:
    """As transformers calls a decoder layer."""
    if "scored_index_N" in arguments:
        return scored_columns(layer, hidden_states, **arguments)
    whole: Tensor = type(layer).forward(layer, hidden_states, **arguments)
    return whole


def scored_columns(
    layer: Any,
    hidden_1TH: Tensor,
    *,
    scored_index_N: Tensor,
    segments: tuple[Segment, ...],
    position_embeddings: tuple[Tensor, Tensor],
    **_: object,
) -> Tensor:
    """The layer's output at the last column of each segment, [1, N, H]. Every weight is used by calling its module."""
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
    """Rotary positions on [1, columns, heads, D]."""
    turned: Tensor = heads * cos.unsqueeze(2) + rotate_half(heads) * sin.unsqueeze(2)
    return turned
