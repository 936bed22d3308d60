"""Parse a row of a user's file into a ConversationGroup. Columns follow TRL's conventions.

Pure. A row that cannot be read raises DataError with the reason. What a row of each kind holds:

pair            prompt + chosen + rejected, each as text or messages; optional margin, chosen_model, rejected_model
                or chosen + rejected as conversations that include the prompt; a text prompt beside them is not read,
                and a list prompt must be their beginning
                or chosen + rejected as texts "\\n\\nHuman: …\\n\\nAssistant: …" of hh-rlhf, with or without a prompt
                or token ids (id_rows.py)
ranked          prompt + completions + gold_scores; or ranks, 1 for the best, instead of gold_scores; optional models
                or instruction + response_1_text, response_2_text, … + all_scores, as in the paper's released files
demonstration   prompt + completion; or messages that end with the assistant's message; or a pair, whose chosen
                completion is imitated
prompt          prompt

Everywhere, ShareGPT's column conversations may stand for messages and for prompt, and a message may be written as
{"from": "system" | "human" | "gpt", "value": text}. A single message may stand for a list of one.
"""

import hashlib
import json
import re
import sys
from collections.abc import Callable, Mapping
from enum import StrEnum
from typing import Any

from rm_robust.data.chat import as_messages
from rm_robust.data.records import ConversationGroup, Message
from rm_robust.errors import DataError


class RowKind(StrEnum):
    """The kinds of rows in users' files."""

    PAIR = "pair"
    RANKED = "ranked"
    TRAINING_PAIRS = "training_pairs"
    """Pairs, and rankings, each of which becomes all its pairs."""
    DEMONSTRATION = "demonstration"
    PROMPT = "prompt"


ID_COLUMNS = (
    ("chosen_ids", "rejected_ids"),
    ("chosen_input_ids", "rejected_input_ids"),
    ("input_ids_chosen", "input_ids_rejected"),
)
"""The columns of pre-tokenised pairs in TRL's RewardTrainer: of today, of 0.24 and later, and of earlier versions."""


ID_LIKE_COLUMNS = frozenset({"pair_id", "prompt_id", "id"})
COLUMNS = ID_LIKE_COLUMNS | {
    *("prompt", "chosen", "rejected", "margin", "chosen_model", "rejected_model"),
    *("completions", "gold_scores", "ranks", "models", "instruction", "all_scores"),
    *("completion", "messages", "conversations", "system", "tools"),
    *("model", "gold_score"),
    *("prompt_ids", *(name for pair in ID_COLUMNS for name in pair)),
}
"""The columns that the rows of a source are read from; those of RELEASED_RESPONSE are read too."""
RELEASED_RESPONSE = re.compile(r"response_[0-9]+_text")
UNREADABLE = "unreadable: "
"""The beginning of a text that stands for a row that could not be read; the reason follows."""


def row_of(text: str) -> dict[str, Any]:
    """Return the row that a JSON text holds. Raises DataError with the reason for any other text."""
    if text.startswith(UNREADABLE):
        raise DataError(text.removeprefix(UNREADABLE))
    try:
        row = json.loads(text, object_pairs_hook=_without_twins)
    except (ValueError, RecursionError) as error:
        raise error if isinstance(error, DataError) else DataError(f"not JSON ({error})") from error
    if not isinstance(row, dict):
        raise DataError(f"a row must be a JSON object, got a {type(row).__name__}")
    return row


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        raise DataError(f"{next(name for name in names if names.count(name) > 1)!r} is there twice")
    return row


def kind_of(columns: set[str]) -> RowKind:
    """Return the kind of a scenario's row from its columns that are not null. Raises DataError that names them."""
    if any(set(pair) <= columns for pair in (("chosen", "rejected"), *ID_COLUMNS)):
        return RowKind.PAIR
    if is_ranked(columns):
        return RowKind.RANKED
    raise DataError(
        f"Columns {sorted(columns)} are neither pairs (prompt, chosen, rejected) nor ranked completions (prompt, "
        "completions, gold_scores or ranks; or instruction, response_1_text …, all_scores)."
    )


def is_ranked(columns: set[str]) -> bool:
    is_own_form = bool({"prompt", "conversations"} & columns) and bool({"gold_scores", "ranks"} & columns)
    return ("completions" in columns and is_own_form) or {"instruction", "all_scores"} <= columns


def parse_row(row: Mapping[str, Any], kind: RowKind | None) -> ConversationGroup:
    """Parse one row of `kind`; without a kind, its columns decide. Raises DataError with the reason."""
    return _PARSERS[resolved_kind(row, kind)](row)


def resolved_kind(row: Mapping[str, Any], kind: RowKind | None) -> RowKind:
    """Return the kind of one row whose source may hold several kinds: PAIR, RANKED, DEMONSTRATION or PROMPT.

    Raises DataError that names the columns when they fit no kind.
    """
    columns = {name for name, value in row.items() if value is not None}
    if kind is None:
        return kind_of(columns)
    if kind is RowKind.TRAINING_PAIRS:
        return RowKind.RANKED if is_ranked(columns) and not {"chosen", "rejected"} <= columns else RowKind.PAIR
    return kind


def parse_pair(row: Mapping[str, Any]) -> ConversationGroup:
    """Parse a pair: the chosen completion first, with gold scores 1 and 0."""
    prompt = _given_prompt(row)
    begin = _DIALOGUE_BEGIN if prompt is None else "\n\nHuman:"
    chosen, rejected = (_dialogue_or_turns(_required(row, name), begin) for name in ("chosen", "rejected"))
    if prompt is None and isinstance(chosen, str):
        raise DataError(
            "chosen is text and there is no prompt, so it is not known where the prompt ends; add a prompt column, or "
            "give conversations as messages or in the form of hh-rlhf (\\n\\nHuman: …\\n\\nAssistant: …)"
        )
    if prompt is None or (isinstance(chosen, list) and len(chosen) > 1):
        prompt, chosen, rejected = _split_conversations(
            _conversation(_with_prompt(prompt, chosen, "chosen"), "chosen"),
            _conversation(_with_prompt(prompt, rejected, "rejected"), "rejected"),
        )
    else:
        prompt = as_messages(prompt)
        chosen, rejected = _completion(chosen, "chosen"), _completion(rejected, "rejected")
    margin, models = margin_and_models(row)
    group_id = given_id(row, "pair_id", [prompt, [chosen, rejected]])
    return ConversationGroup(group_id, prompt, [chosen, rejected], [1.0, 0.0], models, margin)


def margin_and_models(row: Mapping[str, Any]) -> tuple[float | None, list[str]]:
    """Return the margin and the two model names of a pair's row, where it has them (else None and "")."""
    margin = None if row.get("margin") is None else finite_number(row["margin"], "margin")
    return margin, [str(row.get("chosen_model") or ""), str(row.get("rejected_model") or "")]


def parse_ranked(row: Mapping[str, Any]) -> ConversationGroup:
    """Parse K >= 2 completions with a gold score each, in the row's order.

    A rank r (1 is the best) becomes the gold score -r.
    """
    if row.get("all_scores") is not None:
        names = sorted(filter(RELEASED_RESPONSE.fullmatch, row), key=lambda name: int(name.split("_")[1]))
        prompt, raw_completions, raw_scores = (
            as_messages(_required(row, "instruction")),
            [row[name] for name in names],
            _list(row, "all_scores"),
        )
    else:
        prompt, raw_completions, raw_scores = (
            as_messages(_required_prompt(row)),
            _list(row, "completions"),
            _raw_scores(row),
        )
    completions = [_completion(completion, f"completion {index}") for index, completion in enumerate(raw_completions)]
    gold_scores = [finite_number(score, f"gold score {index}") for index, score in enumerate(raw_scores)]
    if len(completions) != len(gold_scores) or len(completions) < 2:
        raise DataError(
            f"{len(completions)} completions with {len(gold_scores)} gold scores or ranks; give at least two of each, "
            "one score or rank for every completion"
        )
    models = [""] * len(completions) if row.get("models") is None else [str(model) for model in _list(row, "models")]
    if len(models) != len(completions):
        raise DataError(f"{len(completions)} completions with {len(models)} model names")
    return ConversationGroup(
        given_id(row, "prompt_id", [prompt, completions]), prompt, completions, gold_scores, models, None
    )


def parse_demonstration(row: Mapping[str, Any]) -> ConversationGroup:
    """Parse a prompt with one completion to imitate, of a pair the chosen one. Its gold score is unknown, and is 0."""
    name = next((name for name in ("messages", "conversations") if row.get(name) is not None), None)
    if row.get("completion") is None and row.get("messages") is None and row.get("chosen") is not None:
        pair = parse_pair(row)
        prompt, completion = pair.prompt, pair.completions[0]
    elif name is not None and (name == "messages" or row.get("completion") is None):
        turns = _conversation(row[name], name)
        prompt, completion = as_messages(turns[:-1]), turns[-1]["content"]
    else:
        prompt, completion = (
            as_messages(_required_prompt(row)),
            _completion(_required(row, "completion"), "completion"),
        )
    return ConversationGroup(given_id(row, "id", [prompt, [completion]]), prompt, [completion], [0.0], [""], None)


def parse_prompt(row: Mapping[str, Any]) -> ConversationGroup:
    """Parse a prompt without completions (K = 0)."""
    prompt = as_messages(_required_prompt(row))
    return ConversationGroup(given_id(row, "prompt_id", [prompt, []]), prompt, [], [], [], None)


def finite_number(value: Any, name: str) -> float:
    """Return `value` as a float. Raises DataError, with `name`, for anything that is not a finite number."""
    # `not abs(value) <= max` rather than `abs(value) > max`: the comparison is false for NaN.
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= sys.float_info.max:
        raise DataError(f"{name} is {value!r}; it must be a finite number")
    return float(value)


def given_id(row: Mapping[str, Any], column: str, content: list[Any]) -> str:
    """Return the id that the row has in `column`, or else a hash of `content`."""
    if row.get(column) is not None:
        return str(row[column])
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


_SHARED_ROLES = {"human": "user", "gpt": "assistant", "observation": "tool", "Human": "user", "Assistant": "assistant"}
"""The usual names of the roles of ShareGPT and hh-rlhf; "system", "user" and "assistant" stay as they are."""
_DIALOGUE_BEGIN = r"\s*Human:"
"""The beginning of a text in the form of hh-rlhf."""
_DIALOGUE_TURN = re.compile(r"\n\n(Human|Assistant):[ ]?")
_DIALOGUE_HEADER = re.compile(r"\n\nAssistant:\s*\Z")
"""The end of a prompt in the form of hh-rlhf."""
_PARSERS: dict[RowKind, Callable[[Mapping[str, Any]], ConversationGroup]] = {
    RowKind.PAIR: parse_pair,
    RowKind.RANKED: parse_ranked,
    RowKind.DEMONSTRATION: parse_demonstration,
    RowKind.PROMPT: parse_prompt,
}


def _required(row: Mapping[str, Any], name: str) -> Any:
    if row.get(name) is None:
        raise DataError(f"column {name!r} is missing or null (columns: {sorted(k for k in row if row[k] is not None)})")
    return row[name]


def _given_prompt(row: Mapping[str, Any]) -> Any:
    """Return the prompt of a row as text or messages; None where the row has none."""
    prompt: Any = row["prompt"] if row.get("prompt") is not None else row.get("conversations")
    header = _DIALOGUE_HEADER.search(prompt) if isinstance(prompt, str) else None
    if header is None or not re.match(_DIALOGUE_BEGIN, prompt):
        return _turns(prompt)
    return _dialogue_or_turns(prompt[: header.start()], _DIALOGUE_BEGIN)


def _required_prompt(row: Mapping[str, Any]) -> Any:
    prompt = _given_prompt(row)
    return _required(row, "prompt") if prompt is None else prompt


def _dialogue_or_turns(value: Any, begin: str) -> Any:
    """Return the messages of a text in the form of hh-rlhf that matches `begin`, or else what `_turns` returns."""
    if not isinstance(value, str) or not re.match(begin, value):
        return _turns(value)
    parts = _DIALOGUE_TURN.split("\n\n" + value.lstrip())
    return [{"role": _SHARED_ROLES[name], "content": text} for name, text in zip(parts[1::2], parts[2::2], strict=True)]


def _turns(value: Any) -> Any:
    """Return messages in their usual form, also from ShareGPT's form. Any other value stays as it is."""
    if isinstance(value, dict):
        value = [value]
    return [_turn(turn) for turn in value] if isinstance(value, list) else value


def _turn(turn: Any) -> Any:
    if not isinstance(turn, dict) or turn.get("role") is not None or not {"from", "value"} <= set(turn):
        return turn
    others = {name: value for name, value in turn.items() if name not in ("from", "value")}
    role = turn["from"]
    return others | {"role": _SHARED_ROLES.get(role, role) if isinstance(role, str) else role, "content": turn["value"]}


def _with_prompt(prompt: Any, turns: Any, name: str) -> Any:
    """Return a conversation that begins with the messages of `prompt`, where there are any."""
    if not isinstance(prompt, list) or not isinstance(turns, list):
        return turns
    said, begin = ([_said(turn) for turn in part] for part in (prompt, turns[: len(prompt)]))
    if said == begin:
        return turns
    if turns and _said(turns[0])[0] == "assistant":
        return [*prompt, *turns]
    raise DataError(f"{name} is a conversation that does not begin with the prompt's messages; correct one of them")


def _said(turn: Any) -> tuple[Any, Any]:
    return (turn.get("role"), turn.get("content")) if isinstance(turn, dict) else (None, turn)


def _raw_scores(row: Mapping[str, Any]) -> list[Any]:
    if row.get("ranks") is None:
        return _list(row, "gold_scores")
    if row.get("gold_scores") is not None:
        raise DataError("columns 'gold_scores' and 'ranks' both order the completions; keep one of them")
    return [-finite_number(rank, f"rank {index}") for index, rank in enumerate(_list(row, "ranks"))]


def _list(row: Mapping[str, Any], name: str) -> list[Any]:
    value = _required(row, name)
    if not isinstance(value, list):
        raise DataError(f"column {name!r} is a {type(value).__name__}; it must be a list")
    return value


def _completion(value: Any, name: str) -> str:
    value = _turns(value)
    if (
        isinstance(value, list)
        and len(value) == 1
        and isinstance(value[0], dict)
        and value[0].get("role") == "assistant"
    ):
        value = value[0].get("content")
    if not isinstance(value, str):
        raise DataError(f"{name} is a {type(value).__name__}; it must be text, or a list of one assistant message")
    return value


def _conversation(value: Any, name: str) -> list[Message]:
    value = _turns(value)
    if (
        not isinstance(value, list)
        or len(value) < 2
        or not isinstance(value[-1], dict)
        or value[-1].get("role") != "assistant"
    ):
        raise DataError(f"{name} must be a list of messages that ends with the assistant's message")
    return [*as_messages(value[:-1]), {"role": "assistant", "content": _completion([value[-1]], name)}]


def _split_conversations(chosen: list[Message], rejected: list[Message]) -> tuple[list[Message], str, str]:
    if chosen[:-1] != rejected[:-1]:
        raise DataError("chosen and rejected differ before their last turn, so they are not two answers to one prompt")
    return chosen[:-1], chosen[-1]["content"], rejected[-1]["content"]
