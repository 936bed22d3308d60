"""Prompt + K completions -> tensors in which a prompt is computed once (shared by SFT, reward model, RLOO and serving).

Two layouts, same numbers to float tolerance:
  segments  one row without padding: [prompt | completion 1 | … | completion K | next prompt | …], position ids restarting at each prompt.
            Attention runs segment by segment (a prompt causally; a completion over its prompt and, causally, itself), so its cost never
            grows with the row. For full-attention decoders on CPU.
  padded    one right-padded row a completion, [prompt, completion]. Any model, any device.

Shapes: R rows, T columns, N completions, M completion tokens, H hidden. Indices are into the flattened [R*T] columns.
"""

from dataclasses import dataclass
from enum import StrEnum

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, PretrainedConfig, PreTrainedModel

from rm_robust.records import TokenGroup

SEGMENT_MODEL_TYPES = ("qwen2", "qwen3", "llama", "mistral")
"""Decoder families whose every layer is full causal attention with rotary positions, checked against one-at-a-time scores by tests."""


class Layout(StrEnum):
    SEGMENTS = "segments"
    PADDED = "padded"


@dataclass(frozen=True)
class Segment:
    """Columns [start, end) attend causally to themselves and fully to [prompt_start, prompt_end) (empty for a prompt)."""

    start: int
    end: int
    prompt_start: int
    prompt_end: int


@dataclass(frozen=True)
class PackedBatch:
    """Groups laid out for one forward pass; completions in group order."""

    input_ids_RT: Tensor
    position_ids_RT: Tensor
    attention_mask_RT: Tensor | None
    segments: tuple[Segment, ...]
    scored_index_N: Tensor
    """Column of every completion's last token: where a reward model reads its score."""
    predictor_index_M: Tensor
    """Column whose hidden state predicts each completion token."""
    target_ids_M: Tensor
    completion_of_M: Tensor
    """Which of the N completions each token belongs to."""

    @property
    def num_tokens(self) -> int:
        """Columns that the model computes, padding included."""
        return self.input_ids_RT.numel()

    def to(self, device: torch.device) -> "PackedBatch":
        def moved(tensor: Tensor) -> Tensor:
            return tensor.to(device, non_blocking=True)

        return PackedBatch(
            moved(self.input_ids_RT),
            moved(self.position_ids_RT),
            None if self.attention_mask_RT is None else moved(self.attention_mask_RT),
            self.segments,
            moved(self.scored_index_N),
            moved(self.predictor_index_M),
            moved(self.target_ids_M),
            moved(self.completion_of_M),
        )


def choose_layout(config: PretrainedConfig, device: torch.device) -> Layout:
    """Segments where they are exact and fast (CPU, full attention); padded everywhere else."""
    full_attention = not getattr(config, "use_sliding_window", False) and getattr(config, "sliding_window", None) is None
    layer_types = getattr(config, "layer_types", None) or []
    full_attention = full_attention and all(kind == "full_attention" for kind in layer_types)
    if device.type == "cpu" and config.model_type in SEGMENT_MODEL_TYPES and full_attention:
        return Layout.SEGMENTS
    return Layout.PADDED


def group_length(group: TokenGroup) -> int:
    """Tokens of a group with its prompt counted once."""
    return len(group.prompt_ids) + sum(len(ids) for ids in group.completion_ids)


def fill_bins(lengths: list[int], max_tokens: int) -> list[list[int]]:
    """First-fit-decreasing: indices into `lengths`, each bin within `max_tokens` (a longer item gets a bin of its own)."""
    bins: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        home = next((b for b in range(len(bins)) if room[b] >= lengths[index]), None)
        if home is None:
            bins.append([])
            room.append(max_tokens)
            home = len(bins) - 1
        bins[home].append(index)
        room[home] -= lengths[index]
    return [sorted(members) for members in bins]


def lay_out(groups: list[TokenGroup], layout: Layout, *, pad_id: int) -> PackedBatch:
    """Tensors of `groups`; every group needs a prompt token, a completion and no empty one (which only we can cause)."""
    assert groups, "nothing to lay out"
    assert all(g.prompt_ids and g.completion_ids and all(g.completion_ids) for g in groups), "an empty prompt or completion"
    return _lay_out_segments(groups) if layout is Layout.SEGMENTS else _lay_out_padded(groups, pad_id)


def _lay_out_segments(groups: list[TokenGroup]) -> PackedBatch:
    ids: list[int] = []
    positions: list[int] = []
    segments: list[Segment] = []
    scored: list[int] = []
    predictors: list[int] = []
    targets: list[int] = []
    owners: list[int] = []
    for group in groups:
        prompt_start, length = len(ids), len(group.prompt_ids)
        prompt_end = prompt_start + length
        ids += group.prompt_ids
        positions += range(length)
        is_single = len(group.completion_ids) == 1  # then prompt and completion are one causal segment
        if not is_single:
            segments.append(Segment(prompt_start, prompt_end, prompt_start, prompt_start))
        for completion in group.completion_ids:
            start = len(ids)
            ids += completion
            positions += range(length, length + len(completion))
            segments.append(Segment(prompt_start, len(ids), prompt_start, prompt_start) if is_single else Segment(start, len(ids), prompt_start, prompt_end))
            predictors += [prompt_end - 1, *range(start, len(ids) - 1)]
            targets += completion
            owners += [len(scored)] * len(completion)
            scored.append(len(ids) - 1)
    return PackedBatch(
        torch.tensor([ids]),
        torch.tensor([positions]),
        None,
        tuple(segments),
        torch.tensor(scored),
        torch.tensor(predictors),
        torch.tensor(targets),
        torch.tensor(owners),
    )


def _lay_out_padded(groups: list[TokenGroup], pad_id: int) -> PackedBatch:
    rows = [(len(g.prompt_ids), g.prompt_ids + completion) for g in groups for completion in g.completion_ids]
    width = max(len(ids) for _, ids in rows)
    input_ids_NT = torch.full((len(rows), width), pad_id)
    attention_mask_NT = torch.zeros(len(rows), width, dtype=torch.long)
    predictors: list[Tensor] = []
    targets: list[Tensor] = []
    for n, (prompt_length, ids) in enumerate(rows):
        input_ids_NT[n, : len(ids)] = torch.tensor(ids)
        attention_mask_NT[n, : len(ids)] = 1
        predictors.append(torch.arange(prompt_length - 1, len(ids) - 1) + n * width)
        targets.append(torch.tensor(ids[prompt_length:]))
    return PackedBatch(
        input_ids_NT,
        torch.arange(width).expand(len(rows), width),
        attention_mask_NT,
        (),
        torch.tensor([n * width + len(ids) - 1 for n, (_, ids) in enumerate(rows)]),
        torch.cat(predictors),
        torch.cat(targets),
        torch.cat([torch.full_like(target, n) for n, target in enumerate(targets)]),
    )


def prepare_backbone(backbone: nn.Module, layout: Layout) -> None:
    """Make a transformers decoder (the module without its head) run `layout`; undone by setting another attention implementation."""
    assert isinstance(backbone, PreTrainedModel)
    backbone.config._attn_implementation = "segments" if layout is Layout.SEGMENTS else "sdpa"


def hidden_states(backbone: nn.Module, batch: PackedBatch) -> Tensor:
    """Last hidden states, [R*T, H], after the final norm."""
    output = backbone(
        input_ids=batch.input_ids_RT,
        position_ids=batch.position_ids_RT,
        attention_mask=batch.attention_mask_RT,
        use_cache=False,
        **({"segments": batch.segments} if batch.segments else {}),
    )
    hidden_RTH: Tensor = output.last_hidden_state
    return hidden_RTH.flatten(0, 1)


def token_logprobs(head: nn.Module, hidden_TH: Tensor, batch: PackedBatch, *, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probability (nats) of every completion token and the entropy of its distribution, both [M] float32; the head runs on those columns only."""
    logits_MV = head(hidden_TH[batch.predictor_index_M]).float() / temperature
    logprobs_MV = F.log_softmax(logits_MV, dim=-1)
    with torch.no_grad():
        entropy_M = -(logprobs_MV.exp() * logprobs_MV).sum(-1)
    return logprobs_MV.gather(1, batch.target_ids_M[:, None]).squeeze(1), entropy_M


def _segment_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    segments: tuple[Segment, ...] = (),
    **_: object,
) -> tuple[Tensor, None]:
    """query [1, heads, T, D], key and value [1, kv_heads, T, D] -> [1, T, heads, D]: the form that transformers expects of an attention function."""
    assert segments, "segment attention needs its segments: the batch was laid out padded"
    repeat = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeat, 1), value.repeat_interleave(repeat, 1)
    # split, not a slice for each segment: the gradient of a slice is as long as the row, so that n slices cost n rows
    lengths = [s.end - s.start for s in segments]
    queries, keys, values = query.split(lengths, 2), key.split(lengths, 2), value.split(lengths, 2)
    number_at = {s.start: number for number, s in enumerate(segments)}
    out = []
    for own, s in enumerate(segments):
        if s.prompt_start == s.prompt_end:
            out.append(F.scaled_dot_product_attention(queries[own], keys[own], values[own], is_causal=True, scale=scaling))
            continue
        prompt = number_at[s.prompt_start]
        seen_keys, seen_values = torch.cat([keys[prompt], keys[own]], 2), torch.cat([values[prompt], values[own]], 2)
        sees = torch.ones(s.end - s.start, seen_keys.shape[2], dtype=torch.bool).tril(s.prompt_end - s.prompt_start)
        out.append(F.scaled_dot_product_attention(queries[own], seen_keys, seen_values, attn_mask=sees, scale=scaling))
    return torch.cat(out, 2).transpose(1, 2).contiguous(), None


AttentionInterface.register("segments", _segment_attention)
