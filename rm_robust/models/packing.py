"""Prompt + K completions -> tensors in which a prompt is computed once (shared by SFT, reward model, RLOO and serving).

Three layouts, same numbers to float tolerance:
  segments  one row without padding: [prompt | completion 1 | … | completion K | next prompt | …], position ids restarting at each prompt.
            Attention runs segment by segment, so its cost never grows with the row. For full-attention decoders on CPU.
  flex      the same row, its attention one FlexAttention kernel that skips blocks in which nothing is seen. For them on CUDA.
  padded    one right-padded row a completion, [prompt, completion]. Any model, any device.

Shapes: R rows, T columns, N completions, M completion tokens, H hidden. Indices are into the flattened [R*T] columns.
"""

import logging
from dataclasses import dataclass
from enum import StrEnum

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from rm_robust.data.records import TokenGroup
from rm_robust.errors import CheckpointError
from rm_robust.models.attention import Segment, tree_mask

logger = logging.getLogger(__name__)

SEGMENT_MODEL_TYPES = ("qwen2", "qwen3", "llama", "mistral")
"""Decoder families whose every layer is full causal attention with rotary positions, checked against one-at-a-time scores by tests."""
LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")


class Layout(StrEnum):
    SEGMENTS = "segments"
    FLEX = "flex"
    PADDED = "padded"


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
    """Packed where that is exact (full attention): segments on CPU, flex on CUDA. Padded for the rest, with one log line that says why.

    Raises CheckpointError for position encodings that depend on the longest row of a batch: no layout can then give one score to one text.
    """
    rope_type = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rope_type in LENGTH_DEPENDENT_ROPE:
        raise CheckpointError(
            f"rope_type = {rope_type!r} scales positions by the longest text of a batch, so a score would depend on what it is computed beside. "
            "Use a model with a fixed scaling (default, linear, yarn, llama3)."
        )
    full_attention = (
        not getattr(config, "use_sliding_window", False) and getattr(config, "sliding_window", None) is None
    )
    layer_types = getattr(config, "layer_types", None) or []
    full_attention = full_attention and all(kind == "full_attention" for kind in layer_types)
    if config.model_type in SEGMENT_MODEL_TYPES and full_attention:
        return Layout.FLEX if device.type == "cuda" else Layout.SEGMENTS
    why = (
        "has sliding-window or hybrid layers"
        if config.model_type in SEGMENT_MODEL_TYPES
        else f"is not one of {', '.join(SEGMENT_MODEL_TYPES)}"
    )
    logger.warning(
        "%s %s: prompts are not shared, completions are computed in padded rows of like lengths", config.model_type, why
    )
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


def share_prompts(groups: list[TokenGroup]) -> tuple[list[TokenGroup], list[tuple[int, int]]]:
    """Groups of equal prompts as one, and where each one's completions are now: (index of its group, number of its first completion there)."""
    shared: dict[tuple[int, ...], TokenGroup] = {}
    index_of: dict[tuple[int, ...], int] = {}
    places = []
    for group in groups:
        key = tuple(group.prompt_ids)
        if key not in shared:
            index_of[key] = len(shared)
            shared[key] = TokenGroup(group.prompt_ids, [])
        places.append((index_of[key], len(shared[key].completion_ids)))
        shared[key].completion_ids.extend(group.completion_ids)
    return list(shared.values()), places


def micro_batches(groups: list[TokenGroup], layout: Layout, max_tokens: int) -> list[list[int]]:
    """Indices into `groups`, each batch within `max_tokens` columns, padding included (a larger group gets a batch of its own).

    Padded, groups of like lengths come together; in the other layouts there is nothing to pad, and bins are filled as full as they get.
    """
    if layout is not Layout.PADDED:
        return fill_bins([group_length(group) for group in groups], max_tokens)
    widths = [len(group.prompt_ids) + max(map(len, group.completion_ids)) for group in groups]
    batches: list[list[int]] = []
    width = num_rows = 0
    for index in sorted(range(len(groups)), key=lambda i: (-widths[i], i)):
        num_rows += len(groups[index].completion_ids)
        if not batches or num_rows * width > max_tokens:
            batches.append([])
            width, num_rows = widths[index], len(groups[index].completion_ids)
        batches[-1].append(index)
    return [sorted(members) for members in batches]


def lay_out(groups: list[TokenGroup], layout: Layout, *, pad_id: int) -> PackedBatch:
    """Tensors of `groups`; every group needs a prompt token, a completion and no empty one (which only we can cause)."""
    assert groups, "nothing to lay out"
    assert all(g.prompt_ids and g.completion_ids and all(g.completion_ids) for g in groups), (
        "an empty prompt or completion"
    )
    return _lay_out_padded(groups, pad_id) if layout is Layout.PADDED else _lay_out_segments(groups)


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
        for number, completion in enumerate(group.completion_ids):
            start = len(ids)
            ids += completion
            positions += range(length, length + len(completion))
            segments.append(
                Segment(start, len(ids), prompt_start, prompt_end)
                if number
                else Segment(prompt_start, len(ids), prompt_start, prompt_start)
            )
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
    backbone.config._attn_implementation = "sdpa" if layout is Layout.PADDED else str(layout)


def hidden_states(backbone: nn.Module, batch: PackedBatch, **for_layers: object) -> Tensor:
    """Last hidden states, [R*T, H], after the final norm. The decoder's layers get `for_layers` too."""
    extra = {"segments": batch.segments, **for_layers} if batch.segments else for_layers
    if getattr(backbone.config, "_attn_implementation", "") == Layout.FLEX:
        extra["tree_mask"] = tree_mask(batch.segments, batch.input_ids_RT.device)  # once for all layers
    output = backbone(
        input_ids=batch.input_ids_RT,
        position_ids=batch.position_ids_RT,
        attention_mask=batch.attention_mask_RT,
        use_cache=False,
        **extra,
    )
    hidden_RTH: Tensor = output.last_hidden_state
    return hidden_RTH.flatten(0, 1)


def token_logprobs(
    head: nn.Module, hidden_TH: Tensor, batch: PackedBatch, *, temperature: float
) -> tuple[Tensor, Tensor]:
    """Log-probability (nats) of every completion token and the entropy of its distribution, both [M] float32; the head runs on those columns only."""
    logits_MV = head(hidden_TH[batch.predictor_index_M]).float() / temperature
    logprobs_MV = F.log_softmax(logits_MV, dim=-1)
    with torch.no_grad():
        entropy_M = -(logprobs_MV.exp() * logprobs_MV).sum(-1)
    return logprobs_MV.gather(1, batch.target_ids_M[:, None]).squeeze(1), entropy_M
