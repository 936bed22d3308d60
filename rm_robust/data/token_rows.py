"""Tokenise the text of one row into token rows, each kept or dropped with a reason. Pure.

row read                                         token rows
a pair, a ranking, a demonstration, a prompt     one
a ranking in training pairs                      one for every two completions; the kept ones share the row's weight
"""

import json
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import pyarrow as pa

from rm_robust.config.data import Overlong
from rm_robust.data.chat import ChatFormat
from rm_robust.data.id_rows import holds_ids, parse_id_pair
from rm_robust.data.records import Message, TokenGroup
from rm_robust.data.rows import RowKind, given_id, margin_and_models, parse_row, resolved_kind, row_of
from rm_robust.data.token_files import TOKEN_SCHEMA
from rm_robust.errors import RmRobustError

MALFORMED = "malformed"
IDENTICAL = "identical completions"
TIED = "tied scores"
PROMPT_TOO_LONG = "prompt too long"
COMPLETION_TOO_LONG = "completion too long"
TRUNCATED = "prompt truncated"
_MAX_TEXT = 300
"""The number of characters of a reason, and of a row's text, that are kept."""

STAGED_SCHEMA = pa.schema(
    [
        *TOKEN_SCHEMA,
        ("scenario", pa.string()),
        ("source_number", pa.int32()),
        ("num_rows_read", pa.int32()),
        ("drop_reason", pa.string()),
        ("truncation", pa.string()),
        ("is_merged", pa.bool_()),
        ("row_text", pa.string()),
    ]
)
"""The columns of kept and dropped token rows.

`num_rows_read` is 1 for the first token row of a source's row and 0 for its others. `drop_reason` is "" for a kept row.
`truncation` is "" for a prompt that is not cut. `is_merged` tells of a kept row in which a token begins in the
assistant header and ends in a completion, so that the prompt ends before it. `row_text` is the beginning of a dropped
or truncated row's text.
"""


@dataclass(frozen=True)
class TokenLimits:
    """The limits on the lengths of a row, and on the share of malformed rows in a source."""

    max_prompt_tokens: int
    max_completion_tokens: int
    """The greatest length of a completion, its end-of-turn token included."""
    max_dropped_fraction: float
    overlong: Overlong = Overlong.DROP
    """What happens to a prompt that is too long and has completions. A prompt that RLOO samples from is never cut,
    because the scorers receive its text."""


@dataclass(frozen=True)
class _Group:
    """A row with its token ids, before the limits are applied."""

    group_id: str
    prompt: list[Message]
    tokens: TokenGroup
    gold_scores: list[float]
    models: list[str]
    margin: float | None


def tokenise_text(
    text: str, *, scenario: str, kind: RowKind | None, chat: ChatFormat, limits: TokenLimits, weight: float = 1.0
) -> list[dict[str, Any]]:
    """Tokenise one JSON row into at least one row of STAGED_SCHEMA (without source_number).

    A dropped row has a reason and no tokens.
    """
    truncation = ""
    try:
        row = row_of(text)
        row_kind = resolved_kind(row, kind)
        group = _tokenised(row, row_kind, chat)
    except RmRobustError as error:
        staged = [_dropped(f"{MALFORMED}: {error}")]
    else:
        num_prompt_tokens = len(group.tokens.prompt_ids)
        prompt_ids = (
            group.tokens.prompt_ids if row_kind is RowKind.PROMPT else fit_prompt(group.tokens.prompt_ids, chat, limits)
        )
        if len(prompt_ids) < num_prompt_tokens:
            truncation = f"{TRUNCATED}: the last {len(prompt_ids)} of {num_prompt_tokens} tokens are left"
            group = replace(group, tokens=TokenGroup(prompt_ids, group.tokens.completion_ids))
        if len(prompt_ids) > limits.max_prompt_tokens:
            staged = [_dropped(PROMPT_TOO_LONG)]
        elif kind is RowKind.TRAINING_PAIRS and row_kind is RowKind.RANKED:
            staged = _pairs_of_ranking(group, limits, weight)
        else:
            reason = _unusable(group.tokens.completion_ids, limits)
            staged = [_dropped(reason) if reason else _kept(group, weight)]
    for number, token_row in enumerate(staged):
        is_whole = not (token_row["drop_reason"] or truncation)
        token_row |= {
            "scenario": scenario,
            "num_rows_read": int(number == 0),
            "truncation": truncation,
            "is_merged": bool(token_row["prompt_ids"]) and not chat.has_whole_header(token_row["prompt_ids"]),
            "row_text": "" if is_whole else text[:_MAX_TEXT],
            "columns_json": text if kind is RowKind.PROMPT and not token_row["drop_reason"] else "",
        }
    return staged


def fit_prompt(prompt_ids: list[int], chat: ChatFormat, limits: TokenLimits) -> list[int]:
    """Cut a too long prompt on its left to `max_prompt_tokens`. Its begin-of-sequence token and assistant header stay.

    Returns the prompt unchanged, and too long, where `limits` forbid cutting, and where only these two would remain.
    """
    bos_ids = prompt_ids[: len(chat.bos_ids)]
    num_kept = limits.max_prompt_tokens - len(bos_ids)
    if (
        limits.overlong is Overlong.DROP
        or len(prompt_ids) <= limits.max_prompt_tokens
        or num_kept <= len(chat.header_ids)
    ):
        return prompt_ids
    return bos_ids + prompt_ids[-num_kept:]


def _tokenised(row: dict[str, Any], kind: RowKind, chat: ChatFormat) -> _Group:
    if kind is RowKind.PAIR and holds_ids(row):
        tokens = parse_id_pair(row, chat)
        margin, models = margin_and_models(row)
        return _Group(
            given_id(row, "pair_id", [tokens.prompt_ids, tokens.completion_ids]), [], tokens, [1.0, 0.0], models, margin
        )
    group = parse_row(row, kind)
    tokens = chat.token_group(group.prompt, group.completions)
    return _Group(group.group_id, group.prompt, tokens, group.gold_scores, group.models, group.margin)


def _pairs_of_ranking(group: _Group, limits: TokenLimits, weight: float) -> list[dict[str, Any]]:
    """Make a pair of every two completions, the better one chosen.

    The weights of the kept pairs sum to `weight`, so that every prompt weighs the same.
    """
    pairs: list[_Group | str] = []
    for first, second in combinations(range(len(group.gold_scores)), 2):
        better, worse = sorted((first, second), key=lambda index: -group.gold_scores[index])
        completion_ids = [group.tokens.completion_ids[better], group.tokens.completion_ids[worse]]
        tie_reason = TIED if group.gold_scores[better] == group.gold_scores[worse] else ""
        models = [group.models[better], group.models[worse]]
        pair = _Group(
            f"{group.group_id}:{better}>{worse}",
            group.prompt,
            TokenGroup(group.tokens.prompt_ids, completion_ids),
            [1.0, 0.0],
            models,
            None,
        )
        pairs.append(_unusable(completion_ids, limits) or tie_reason or pair)
    num_kept = sum(isinstance(pair, _Group) for pair in pairs)
    return [_dropped(pair) if isinstance(pair, str) else _kept(pair, weight / num_kept) for pair in pairs]


def _unusable(completion_ids: list[list[int]], limits: TokenLimits) -> str:
    if any(len(ids) > limits.max_completion_tokens for ids in completion_ids):
        return COMPLETION_TOO_LONG
    if len(set(map(tuple, completion_ids))) < len(completion_ids):
        return IDENTICAL
    return ""


def _kept(group: _Group, weight: float) -> dict[str, Any]:
    return {
        "group_id": group.group_id,
        "prompt_json": json.dumps(group.prompt, ensure_ascii=False),
        "prompt_ids": group.tokens.prompt_ids,
        "completion_ids": group.tokens.completion_ids,
        "gold_scores": group.gold_scores,
        "models": group.models,
        "margin": group.margin,
        "weight": weight,
        "drop_reason": "",
    }


def _dropped(reason: str) -> dict[str, Any]:
    empty: dict[str, Any] = {
        "group_id": "",
        "prompt_json": "",
        "prompt_ids": [],
        "completion_ids": [],
        "gold_scores": [],
        "models": [],
        "margin": None,
    }
    return {**empty, "weight": 0.0, "drop_reason": reason[:_MAX_TEXT]}
