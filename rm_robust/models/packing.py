"""Lay out prompts with K completions as tensors in which a prompt is computed once.

SFT, reward-model training, RLOO and serving use it. Three layouts give the same numbers to float tolerance:
  segments  one row without padding: [prompt | completion 1 | … | completion K | next prompt | …], with position ids
            that restart at each prompt. Attention runs segment by segment, so its cost does not grow with the length of
            the row. For full-attention decoders on CPUs.
  flex      the same row, with one FlexAttention kernel that skips the blocks in which nothing is seen. For the same
            decoders on CUDA.
  padded    one right-padded row for each completion: [prompt, completion]. For any model on any device.

Shapes: R rows, T columns, N completions, M completion tokens, H hidden. Indices are into the flattened [R*T] columns.
"""

import logging
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from rm_robust.data.records import TokenGroup
from rm_robust.models.attention import Segment, tree_mask

logger = logging.getLogger(__name__)

SEGMENT_MODEL_TYPES = (
    *("llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen2_moe", "qwen3_moe", "gemma", "phi3", "olmo", "olmo2"),
    *("smollm3", "granite", "granitemoe", "cohere", "gpt_neox", "glm", "glm4", "starcoder2"),
)
"""Decoder families whose layers hand their keyword arguments on to transformers' attention interface.

tests/unit/models/test_families.py compares each family with transformers' own eager forward pass.
"""
LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")
"""Kinds of rotary positions that depend on the longest text of a batch, once it is longer than in pre-training."""


class Layout(StrEnum):
    """The layouts that the head of this file describes."""

    SEGMENTS = "segments"
    FLEX = "flex"
    PADDED = "padded"


@dataclass(frozen=True)
class PackedBatch:
    """Groups laid out for one forward pass, with their completions in group order."""

    input_ids_RT: Tensor
    position_ids_RT: Tensor
    attention_mask_RT: Tensor | None
    segments: tuple[Segment, ...]
    scored_index_N: Tensor
    """Column of every completion's last token, at which a reward model reads its score."""
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
    """Return a packed layout for full attention, where it is exact: segments on CPU, flex on CUDA.

    Other models get the padded layout, and one log line says why.
    """
    config = config.get_text_config()
    if config.model_type in SEGMENT_MODEL_TYPES and _has_full_attention(config):
        return Layout.FLEX if device.type == "cuda" else Layout.SEGMENTS
    reason = (
        "has sliding-window or hybrid layers"
        if config.model_type in SEGMENT_MODEL_TYPES
        else f"is not one of {', '.join(SEGMENT_MODEL_TYPES)}"
    )
    logger.warning(
        "%s %s: prompts are not shared, and completions are computed in padded rows of similar lengths",
        config.model_type,
        reason,
    )
    return Layout.PADDED


def num_positions(config: PretrainedConfig) -> int | None:
    """Return the length, in tokens, of the longest text that a model takes; None where its config has no bound.

    Positions that scale with the longest text of a batch (LENGTH_DEPENDENT_ROPE) begin to do so where pre-training
    ended. A longer text would change the scores of the texts beside it, so it is not taken.
    """
    config = config.get_text_config()
    limits = [getattr(config, "max_position_embeddings", None)]
    rope = getattr(config, "rope_parameters", None) or {}
    for parameters in [rope, *(part for part in rope.values() if isinstance(part, dict))]:  # one for each kind of layer
        if parameters.get("rope_type") in LENGTH_DEPENDENT_ROPE:
            limits.append(parameters.get("original_max_position_embeddings"))
    return min((limit for limit in limits if isinstance(limit, int) and limit > 0), default=None)


def _has_full_attention(config: PretrainedConfig) -> bool:
    """Return whether every layer attends to the whole text before a token, and softmax is all that weighs it."""
    has_window = getattr(config, "use_sliding_window", True) and getattr(config, "sliding_window", None)
    layer_types = getattr(config, "layer_types", None) or []
    return not has_window and all(kind == "full_attention" for kind in layer_types) and not _caps_attention(config)


def _caps_attention(config: PretrainedConfig) -> bool:
    """Return whether the model caps its attention logits (Gemma 2), which transformers' sdpa leaves out."""
    return getattr(config, "attn_logit_softcapping", None) is not None


def group_length(group: TokenGroup) -> int:
    """Return the number of tokens of a group, with its prompt counted once."""
    return len(group.prompt_ids) + sum(len(ids) for ids in group.completion_ids)


def fill_bins(lengths: list[int], max_tokens: int) -> list[list[int]]:
    """Fill bins by first-fit-decreasing; return the indices into `lengths` of each bin.

    A bin holds at most `max_tokens`. A longer item gets a bin of its own.
    """
    bins: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        bin_index = next((b for b in range(len(bins)) if room[b] >= lengths[index]), None)
        if bin_index is None:
            bins.append([])
            room.append(max_tokens)
            bin_index = len(bins) - 1
        bins[bin_index].append(index)
        room[bin_index] -= lengths[index]
    return [sorted(members) for members in bins]


def share_prompts(groups: list[TokenGroup]) -> tuple[list[TokenGroup], list[tuple[int, int]]]:
    """Merge groups of equal prompts; return the merged groups and where the completions of each given group are now.

    That is (index of the merged group, number of the given group's first completion in it).
    """
    shared: dict[tuple[int, ...], TokenGroup] = {}
    index_of: dict[tuple[int, ...], int] = {}
    locations = []
    for group in groups:
        key = tuple(group.prompt_ids)
        if key not in shared:
            index_of[key] = len(shared)
            shared[key] = TokenGroup(group.prompt_ids, [])
        locations.append((index_of[key], len(shared[key].completion_ids)))
        shared[key].completion_ids.extend(group.completion_ids)
    return list(shared.values()), locations


def micro_batches(groups: list[TokenGroup], layout: Layout, max_tokens: int) -> list[list[int]]:
    """Return the indices into `groups` of each batch.

    A batch has at most `max_tokens` columns, padding included. A larger group gets a batch of its own. In the padded
    layout, groups of similar lengths come together. The other layouts have no padding, and their batches are filled as
    far as possible.
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
    """Return the tensors of `groups`. Every group must have a prompt token and completions, none of them empty."""
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
    """Make a transformers decoder (the module without its head) run `layout`.

    Padded rows run with the model's own attention: sdpa where transformers computes the same with it, else eager.
    Setting another attention implementation undoes it.
    """
    assert isinstance(backbone, PreTrainedModel)
    if layout is not Layout.PADDED:
        backbone.set_attn_implementation(str(layout))
        return
    has_sdpa = backbone._supports_sdpa and not _caps_attention(backbone.config.get_text_config())
    backbone.set_attn_implementation("sdpa" if has_sdpa else "eager")


def forward_arguments(backbone: nn.Module, batch: PackedBatch) -> dict[str, Any]:
    """Return the arguments with which a decoder, or the whole model around it, computes a batch."""
    layout: dict[str, Any] = {"segments": batch.segments} if batch.segments else {}
    if getattr(backbone.config, "_attn_implementation", "") == Layout.FLEX:
        layout["tree_mask"] = tree_mask(batch.segments, batch.input_ids_RT.device)  # once for all layers
    return {
        "input_ids": batch.input_ids_RT,
        "position_ids": batch.position_ids_RT,
        "attention_mask": batch.attention_mask_RT,
        "use_cache": False,
        **layout,
    }


def hidden_states(backbone: nn.Module, batch: PackedBatch, **for_layers: object) -> Tensor:
    """Return the last hidden states after the final norm, [R*T, H]. The decoder's layers get `for_layers` too."""
    hidden_RTH: Tensor = backbone(**forward_arguments(backbone, batch), **for_layers).last_hidden_state
    return hidden_RTH.flatten(0, 1)


def completion_logits(model: PreTrainedModel, batch: PackedBatch) -> Tensor:
    """Return the logits [M, V] with which a causal language model predicts every completion token.

    The model's own forward pass computes them, with whatever it does to the logits after its output embeddings:
    softcapping (Gemma 2), a scale (Granite, Cohere). Between the decoder and its head, the columns that predict no
    completion token are left out.
    """

    def keep_predictors(_: nn.Module, __: object, output: BaseModelOutputWithPast) -> BaseModelOutputWithPast:
        assert output.last_hidden_state is not None
        predictors_1MH = output.last_hidden_state.flatten(0, 1)[None, batch.predictor_index_M]
        output.last_hidden_state = predictors_1MH  # type: ignore[assignment]  # transformers names the CPU's float type
        return output

    handle = model.get_decoder().register_forward_hook(keep_predictors)
    try:
        logits_1MV: Tensor = model(**forward_arguments(model.base_model, batch)).logits
    finally:
        handle.remove()
    assert logits_1MV.shape[:2] == (1, len(batch.predictor_index_M)), (
        f"the head of {type(model).__name__} gave {tuple(logits_1MV.shape)} logits for {len(batch.predictor_index_M)}"
    )
    return logits_1MV[0]


def token_logprobs(logits_MV: Tensor, target_ids_M: Tensor, *, temperature: float) -> tuple[Tensor, Tensor]:
    """Return the log-probability (nats) of every target token and the entropy of its distribution, [M] float32."""
    logprobs_MV = F.log_softmax(logits_MV.float() / temperature, dim=-1)
    with torch.no_grad():
        entropy_M = -(logprobs_MV.exp() * logprobs_MV).sum(-1)
    return logprobs_MV.gather(1, target_ids_M[:, None]).squeeze(1), entropy_M
