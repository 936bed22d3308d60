"""Attention over packed rows: a completion sees its prompt and, causally, itself.

Two kernels with the same results are registered with transformers:
  segments  for CPUs only: flash attention over each segment on its own. The further completions of a prompt attend to
            it in one call, without a mask, and the two softmaxes are joined by their log-sum-exps. No row is computed
            twice, and none is thrown away.
  flex      for CUDA: one FlexAttention kernel that skips the blocks in which nothing is seen.

SegmentAttention is speed work for CPUs only, and it relies on private names of torch: the operators
`_scaled_dot_product_flash_attention_for_cpu` and `_scaled_dot_product_flash_attention_for_cpu_backward` of
`torch.ops.aten`, with their arguments and the log-sum-exp that the first of them returns. When a version of torch
changes them, tests/unit/models/test_packing.py fails: it compares the results with those of plain transformers.

Shapes: T columns of a row, Q queries, D features of a head.
"""

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from transformers import AttentionInterface

from rm_robust.errors import CheckpointError

flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
"""The operator that scaled_dot_product_attention calls on CPUs: query, key, value -> (out, log-sum-exp).

scaled_dot_product_attention itself does not return the log-sum-exp.
"""
flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


@dataclass(frozen=True)
class Segment:
    """Columns [start, end), which attend causally to themselves and fully to the columns [prompt_start, prompt_end).

    The second range is empty for a prompt with its first completion, which are one segment.
    """

    start: int
    end: int
    prompt_start: int
    prompt_end: int


def every_column(segments: tuple[Segment, ...]) -> tuple[slice, ...]:
    """Return where each segment's queries lie along Q when every column of the row has a query."""
    return tuple(slice(segment.start, segment.end) for segment in segments)


def last_columns(segments: tuple[Segment, ...]) -> tuple[slice, ...]:
    """Return where each segment's query lies along Q when only the last column of a segment has a query."""
    return tuple(slice(number, number + 1) for number in range(len(segments)))


@dataclass(frozen=True)
class Family:
    """A prompt with its completions, which follow each other in the row.

    `first` is the prompt with its first completion, and `others` are the further completions. `queries` says for each
    of them, in this order, where its queries lie along Q.
    """

    first: Segment
    others: tuple[Segment, ...]
    queries: tuple[slice, ...]

    @property
    def parts(self) -> Iterator[tuple[Segment, slice]]:
        """Return each segment with its queries."""
        return zip((self.first, *self.others), self.queries, strict=True)

    @property
    def prompt(self) -> slice:
        """Return the columns of the prompt. The family must have further completions."""
        return slice(self.others[0].prompt_start, self.others[0].prompt_end)

    @property
    def queries_of_others(self) -> slice:
        """Return the queries of the further completions. The family must have some."""
        return slice(self.queries[1].start, self.queries[-1].stop)


def families(segments: tuple[Segment, ...], queries: tuple[slice, ...]) -> Iterator[Family]:
    """Yield the families of a row in their order."""
    starts = [number for number, s in enumerate(segments) if s.prompt_start == s.prompt_end]
    for start, end in zip(starts, [*starts[1:], len(segments)], strict=True):
        assert all(s.prompt_start == segments[start].start for s in segments[start + 1 : end]), (
            "a completion follows the prompt of another one"
        )
        yield Family(segments[start], segments[start + 1 : end], queries[start:end])


def is_causal(queries: slice) -> bool:
    """Return whether the queries need a causal mask. A single query is its segment's last column and sees all of it."""
    return bool(queries.stop - queries.start > 1)


class SegmentAttention(torch.autograd.Function):
    """The attention of queries to their segments and prompts, with its gradient.

    query [1, heads, Q, D], key and value [1, heads, T, D] -> [1, heads, Q, D]. `queries` is the result of every_column
    or of last_columns.

    A softmax over two sets of keys is the mean of the softmaxes over each set, weighted by exp(log-sum-exp). Its
    gradient is the sum of the gradients of each set, if the flash kernel is given the output and the log-sum-exp of the
    whole softmax (Dao, FlashAttention-2, 2023, section 3; as in ring attention).
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        segments: tuple[Segment, ...],
        queries: tuple[slice, ...],
        scale: float,
    ) -> Tensor:
        outs, normalisers = [], []
        for family in families(segments, queries):
            for s, columns in family.parts:
                inputs = (query[:, :, columns], key[:, :, s.start : s.end], value[:, :, s.start : s.end])
                out, normaliser = flash(*inputs, 0.0, is_causal(columns), attn_mask=None, scale=scale)
                outs.append(out)
                normalisers.append(normaliser)
            if family.others:
                own_out, own_normaliser = (torch.cat(parts[-len(family.others) :], 2) for parts in (outs, normalisers))
                prompt_out, prompt_normaliser = flash(
                    *(query[:, :, family.queries_of_others], key[:, :, family.prompt], value[:, :, family.prompt]),
                    0.0,
                    False,
                    attn_mask=None,
                    scale=scale,
                )
                own_share = torch.sigmoid(own_normaliser - prompt_normaliser)[..., None]
                joined_out = torch.lerp(prompt_out.float(), own_out.float(), own_share).to(query.dtype)
                outs[-len(family.others) :] = [joined_out]
                normalisers[-len(family.others) :] = [torch.logaddexp(own_normaliser, prompt_normaliser)]
        all_out, normaliser = torch.cat(outs, 2), torch.cat(normalisers, 2)
        ctx.save_for_backward(query, key, value, all_out, normaliser)
        ctx.segments, ctx.queries, ctx.scale = segments, queries, scale
        return all_out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, all_out, normaliser = ctx.saved_tensors
        [gradient] = gradients
        totals = [torch.zeros_like(part, dtype=torch.float32) for part in (query, key, value)]

        def add(columns: slice, keys: slice, *, causal: bool) -> None:
            parts = flash_backward(
                *(
                    gradient[:, :, columns],
                    query[:, :, columns],
                    key[:, :, keys],
                    value[:, :, keys],
                    all_out[:, :, columns],
                    normaliser[:, :, columns],
                ),
                *(0.0, causal),
                attn_mask=None,
                scale=ctx.scale,
            )
            for total, part, part_columns in zip(totals, parts, (columns, keys, keys), strict=True):
                total[:, :, part_columns] += part

        for family in families(ctx.segments, ctx.queries):
            for s, columns in family.parts:
                add(columns, slice(s.start, s.end), causal=is_causal(columns))
            if family.others:
                add(family.queries_of_others, family.prompt, causal=False)
        return *(total.to(query.dtype) for total in totals), None, None, None


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: tuple[Segment, ...],
    queries: tuple[slice, ...],
    *,
    scale: float,
) -> Tensor:
    """Run SegmentAttention: query [1, heads, Q, D], key and value [1, kv_heads, T, D] -> [1, Q, heads, D]."""
    query, key, value = in_autocast_dtype(query, key, value)
    repeat = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeat, 1), value.repeat_interleave(repeat, 1)
    out: Tensor = SegmentAttention.apply(query, key, value, segments, queries, scale)  # type: ignore[no-untyped-call]
    return out.transpose(1, 2).contiguous()


def segment_attention(
    module: object,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    segments: tuple[Segment, ...] = (),
    **further: object,
) -> tuple[Tensor, None]:
    """Run SegmentAttention for every column, in the form that transformers expects of an attention function.

    query [1, heads, T, D], key and value [1, kv_heads, T, D] -> [1, T, heads, D]. Raises CheckpointError for a layer
    that asks for more than softmax over the whole text before a token.
    """
    require_plain_attention(module, further)
    assert segments, "segment attention needs its segments: the batch was laid out padded"
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return attend(query, key, value, segments, every_column(segments), scale=scale), None


BEYOND_PLAIN_ATTENTION = ("softcap", "sliding_window", "s_aux", "position_bias")
"""What transformers' layers ask of an attention function that our two kernels do not compute."""


def require_plain_attention(module: object, arguments: Mapping[str, object]) -> None:
    """Raise CheckpointError for a layer that asks for what BEYOND_PLAIN_ATTENTION lists."""
    asked = [name for name in BEYOND_PLAIN_ATTENTION if arguments.get(name) is not None]
    if asked:
        raise CheckpointError(
            f"{type(module).__name__} asks its attention for {', '.join(asked)}, which packed rows do not compute. "
            "This family must run in padded rows (packing.choose_layout)."
        )


def in_autocast_dtype(*parts: Tensor) -> tuple[Tensor, ...]:
    """Return the tensors in autocast's dtype, or as they are where autocast is off.

    Kernels that are called by name do not convert by themselves, and rotary positions make queries and keys float32.
    """
    device = parts[0].device.type
    return (
        tuple(part.to(torch.get_autocast_dtype(device)) for part in parts)
        if torch.is_autocast_enabled(device)
        else parts
    )


def tree_mask(segments: tuple[Segment, ...], device: torch.device) -> BlockMask:
    """Return FlexAttention's mask of a row.

    A column sees itself, the columns before it in its own segment, and all of its prompt.
    """
    lengths = torch.tensor([s.end - s.start for s in segments])
    own_start_T = torch.tensor([s.start for s in segments]).repeat_interleave(lengths).to(device)
    prompt_start_T = torch.tensor([s.prompt_start for s in segments]).repeat_interleave(lengths).to(device)
    prompt_end_T = torch.tensor([s.prompt_end for s in segments]).repeat_interleave(lengths).to(device)

    def sees(_: Tensor, __: Tensor, query: Tensor, key: Tensor) -> Tensor:
        in_own = (key >= own_start_T[query]) & (key <= query)
        return in_own | ((key >= prompt_start_T[query]) & (key < prompt_end_T[query]))

    length = len(own_start_T)
    # a compiled create_block_mask never holds the whole T x T square
    return create_block_mask(
        sees, B=None, H=None, Q_LEN=length, KV_LEN=length, device=device.type, _compile=device.type == "cuda"
    )


def tree_attention(
    module: object,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    tree_mask: BlockMask | None = None,
    **further: object,
) -> tuple[Tensor, None]:
    """Compute the same as segment_attention, with one kernel.

    The kernel is compiled on CUDA. Elsewhere it is the slow reference that tests compare with.
    """
    require_plain_attention(module, further)
    assert tree_mask is not None, "flex attention needs its mask: the batch was laid out padded"
    query, key, value = in_autocast_dtype(query, key, value)
    kernel = _compiled_flex_attention() if query.is_cuda else flex_attention
    out = kernel(query, key, value, block_mask=tree_mask, scale=scaling, enable_gqa=query.shape[1] != key.shape[1])
    return out.transpose(1, 2).contiguous(), None


@functools.cache
def _compiled_flex_attention() -> Any:
    return torch.compile(flex_attention, dynamic=True)


AttentionInterface.register("segments", segment_attention)
AttentionInterface.register("flex", tree_attention)
