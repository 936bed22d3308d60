"""The forward of a reward model that only scores: the same numbers as PackedRewardModel's, with less work. For CPUs, without gradients.

Of the last layer, everything but keys and values is needed at the scored columns alone: a query, an attention row, an MLP row a completion instead
of one a token. In a model of two layers that is almost half of the arithmetic, in one of thirty a thirtieth. (Weights packed once in oneDNN's order
gave nothing on top: 2.5 to 3.5 ms a dialogue instead of 2.5 to 2.7, because the rows of every batch have another length.)

Shapes: T columns of a packed row, N completions, H hidden, D of a head, G key-value heads, Q query heads for each of them.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from rm_robust.packed_attention import Segment
from rm_robust.packing import Layout, PackedBatch, hidden_states
from rm_robust.reward_model.model import PackedRewardModel, ScoredBatch, score_head


class ScoringForward(nn.Module):
    """Takes the model apart: it can no longer be trained, saved, or used by anything else."""

    def __init__(self, packed: PackedRewardModel) -> None:
        super().__init__()
        assert packed.layout is Layout.SEGMENTS, "other layouts are not for CPUs"
        self.layout = packed.layout
        backbone: Any = packed.backbone  # transformers annotates no module of a decoder
        self.head = score_head(packed.model)
        self.last_layer: Any = backbone.layers[-1]
        self.final_norm: Any = backbone.norm
        backbone.layers = backbone.layers[:-1]
        backbone.config.num_hidden_layers -= 1
        backbone.norm = nn.Identity()
        self.backbone: Any = backbone

    def forward(self, batch: PackedBatch) -> ScoredBatch:
        hidden_TH = hidden_states(self.backbone, batch)
        before_NH = self._last_layer(hidden_TH, batch)
        scored_NH = self.final_norm(before_NH).float()
        return ScoredBatch(self.head(scored_NH).squeeze(1), before_NH.float(), scored_NH)

    def _last_layer(self, hidden_TH: Tensor, batch: PackedBatch) -> Tensor:
        """Its output at the scored columns, [N, H]."""
        layer, attention, scored_N = self.last_layer, self.last_layer.self_attn, batch.scored_index_N
        normed_TH = layer.input_layernorm(hidden_TH)
        size = attention.head_dim
        query_N = attention.q_proj(normed_TH[scored_N]).view(len(scored_N), -1, size)
        key_T = attention.k_proj(normed_TH).view(len(hidden_TH), -1, size)
        value_T = attention.v_proj(normed_TH).view(len(hidden_TH), -1, size)
        if hasattr(attention, "q_norm"):  # Qwen 3
            query_N, key_T = attention.q_norm(query_N), attention.k_norm(key_T)
        cos, sin = self.backbone.rotary_emb(hidden_TH[None], batch.position_ids_RT)
        query_N = rotated(query_N, cos[0, scored_N], sin[0, scored_N])
        key_T = rotated(key_T, cos[0], sin[0])
        attended_NH = attend_scored_columns(query_N, key_T, value_T, batch.segments, scaling=attention.scaling)
        hidden_NH = hidden_TH[scored_N] + attention.o_proj(attended_NH)
        output_NH: Tensor = hidden_NH + layer.mlp(layer.post_attention_layernorm(hidden_NH))
        return output_NH


def rotated(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions on [columns, heads, D]."""
    turned: Tensor = apply_rotary_pos_emb(heads, heads, cos, sin, unsqueeze_dim=1)[0]
    return turned


def attend_scored_columns(query_N: Tensor, key_T: Tensor, value_T: Tensor, segments: tuple[Segment, ...], *, scaling: float) -> Tensor:
    """Attention rows of the last column of each segment, over its prompt and itself: query [N, G*Q, D], key and value [T, G, D] -> [N, G*Q*D]."""
    num_kv = key_T.shape[1]
    rows = []
    for query, segment in zip(query_N, segments, strict=True):
        parts = []
        for tensor in (key_T, value_T):
            own = tensor[segment.start : segment.end]
            prompt = tensor[segment.prompt_start : segment.prompt_end]
            parts.append((torch.cat([prompt, own]) if len(prompt) else own).transpose(0, 1))
        # one query a head: the Q heads of a key-value head stand where other attention has its columns
        rows.append(F.scaled_dot_product_attention(query.view(1, num_kv, -1, query.shape[-1]), parts[0][None], parts[1][None], scale=scaling).flatten())
    return torch.stack(rows)
