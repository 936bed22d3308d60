"""Attention over packed rows: a completion sees its prompt and, causally, itself. Two kernels of the same numbers, registered with transformers.

  segments  for CPUs: flash attention of every segment on its own; a prompt's further completions meet it in one call, without a mask, and the two
            softmaxes are joined by their log-sum-exps. No row is computed twice, none thrown away.
  flex      for CUDA: one FlexAttention kernel that skips blocks in which nothing is seen.

Shapes: T columns of a row, D of a head.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from transformers import AttentionInterface

flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
"""What scaled_dot_product_attention calls on CPUs; it alone gives the log-sum-exp. (out, log-sum-exp) of query, key, value."""
flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


@dataclass(frozen=True)
class Segment:
    """Columns [start, end) attend causally to themselves and fully to [prompt_start, prompt_end) (empty for a prompt with its first completion)."""

    start: int
    end: int
    prompt_start: int
    prompt_end: int


def every_column(segments: tuple[Segment, ...]) -> tuple[slice, ...]:
    """The queries of each segment, where every column of the row has one."""
    return tuple(slice(segment.start, segment.end) for segment in segments)


def last_columns(segments: tuple[Segment, ...]) -> tuple[slice, ...]:
    """The queries of each segment, where only its last column has one."""
    return tuple(slice(number, number + 1) for number in range(len(segments)))


@dataclass(frozen=True)
class Family:
    """A prompt with its first completion, and the further ones, which follow it in the row; where the queries of each are."""

    first: Segment
    others: tuple[Segment, ...]
    queries: tuple[slice, ...]

    @property
    def parts(self) -> Iterator[tuple[Segment, slice]]:
        return zip((self.first, *self.others), self.queries, strict=True)

    @property
    def prompt(self) -> slice:
        """Columns of the prompt. There are others."""
        return slice(self.others[0].prompt_start, self.others[0].prompt_end)

    @property
    def queries_of_others(self) -> slice:
        return slice(self.queries[1].start, self.queries[-1].stop)


def families(segments: tuple[Segment, ...], queries: tuple[slice, ...]) -> Iterator[Family]:
    heads = [number for number, s in enumerate(segments) if s.prompt_start == s.prompt_end]
    for at, after in zip(heads, [*heads[1:], len(segments)], strict=True):
        assert all(s.prompt_start == segments[at].start for s in segments[at + 1 : after]), (
            "a completion stands beside another prompt"
        )
        yield Family(segments[at], segments[at + 1 : after], queries[at:after])


def is_causal(queries: slice) -> bool:
    """A single query is the last of its segment and sees all of it."""
    return bool(queries.stop - queries.start > 1)


class SegmentAttention(torch.autograd.Function):
    """query [1, heads, Q, D], key and value [1, heads, T, D] -> [1, heads, Q, D]; `queries`: every column's, or each segment's last.

    A softmax over two sets of keys is the mean of the softmaxes over each, weighted by exp(log-sum-exp). Its gradient is the sum of each set's own,
    where the flash kernel is told the whole softmax's output and log-sum-exp (Dao, FlashAttention-2, 2023, section 3; as in ring attention).
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
                own_parts = (query[:, :, columns], key[:, :, s.start : s.end], value[:, :, s.start : s.end])
                out, normaliser = flash(*own_parts, 0.0, is_causal(columns), attn_mask=None, scale=scale)
                outs.append(out)
                normalisers.append(normaliser)
            if family.others:
                own, own_normaliser = (torch.cat(parts[-len(family.others) :], 2) for parts in (outs, normalisers))
                seen, seen_normaliser = flash(
                    *(query[:, :, family.queries_of_others], key[:, :, family.prompt], value[:, :, family.prompt]),
                    0.0,
                    False,
                    attn_mask=None,
                    scale=scale,
                )
                share_of_own = torch.sigmoid(own_normaliser - seen_normaliser)[..., None]
                outs[-len(family.others) :] = [torch.lerp(seen.float(), own.float(), share_of_own).to(query.dtype)]
                normalisers[-len(family.others) :] = [torch.logaddexp(own_normaliser, seen_normaliser)]
        whole, normaliser = torch.cat(outs, 2), torch.cat(normalisers, 2)
        ctx.save_for_backward(query, key, value, whole, normaliser)
        ctx.segments, ctx.queries, ctx.scale = segments, queries, scale
        return whole

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, whole, normaliser = ctx.saved_tensors
        [gradient] = gradients
        totals = [torch.zeros_like(part, dtype=torch.float32) for part in (query, key, value)]

        def add(columns: slice, keys: slice, *, is_causal: bool) -> None:
            parts = flash_backward(
                *(
                    gradient[:, :, columns],
                    query[:, :, columns],
                    key[:, :, keys],
                    value[:, :, keys],
                    whole[:, :, columns],
                    normaliser[:, :, columns],
                ),
                *(0.0, is_causal),
                attn_mask=None,
                scale=ctx.scale,
            )
            for total, part, where in zip(totals, parts, (columns, keys, keys), strict=True):
                total[:, :, where] += part

        for family in families(ctx.segments, ctx.queries):
            for s, columns in family.parts:
                add(columns, slice(s.start, s.end), is_causal=is_causal(columns))
            if family.others:
                add(family.queries_of_others, family.prompt, is_causal=False)
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
    """query [1, heads, Q, D], key and value [1, kv_heads, T, D] -> [1, Q, heads, D]."""
    query, key, value = of_autocast(query, key, value)
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
    **_: object,
) -> tuple[Tensor, None]:
    """query [1, heads, T, D], key and value [1, kv_heads, T, D] -> [1, T, heads, D]: the form that transformers expects of an attention function."""
    assert segments, "segment attention needs its segments: the batch was laid out padded"
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return attend(query, key, value, segments, every_column(segments), scale=scale), None


def of_autocast(*parts: Tensor) -> tuple[Tensor, ...]:
    """In autocast's dtype, which kernels called by name do not get by themselves: rotary positions have made queries and keys float32."""
    device = parts[0].device.type
    return (
        tuple(part.to(torch.get_autocast_dtype(device)) for part in parts)
        if torch.is_autocast_enabled(device)
        else parts
    )


def tree_mask(segments: tuple[Segment, ...], device: torch.device) -> BlockMask:
    """Who sees whom in a row, for FlexAttention: a column sees those before it in its own segment and all of its prompt."""
    lengths = torch.tensor([s.end - s.start for s in segments])
    own_start_T = torch.tensor([s.start for s in segments]).repeat_interleave(lengths).to(device)
    prompt_start_T = torch.tensor([s.prompt_start for s in segments]).repeat_interleave(lengths).to(device)
    prompt_end_T = torch.tensor([s.prompt_end for s in segments]).repeat_interleave(lengths).to(device)

    def sees(_: Tensor, __: Tensor, query: Tensor, key: Tensor) -> Tensor:
        in_own = (key >= own_start_T[query]) & (key <= query)
        return in_own | ((key >= prompt_start_T[query]) & (key < prompt_end_T[query]))

    length = len(own_start_T)
    # compiled, it never holds the whole square
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
    **_: object,
) -> tuple[Tensor, None]:
    """As segment_attention, by one kernel. Compiled on CUDA; elsewhere the slow reference, which tests compare it with."""
    assert tree_mask is not None, "flex attention needs its mask: the batch was laid out padded"
    query, key, value = of_autocast(query, key, value)
    attend = _compiled_flex_attention() if query.is_cuda else flex_attention
    out = attend(query, key, value, block_mask=tree_mask, scale=scaling, enable_gqa=query.shape[1] != key.shape[1])
    return out.transpose(1, 2).contiguous(), None


@functools.cache
def _compiled_flex_attention() -> Any:
    return torch.compile(flex_attention, dynamic=True)


AttentionInterface.register("segments", segment_attention)
AttentionInterface.register("flex", tree_attention)
