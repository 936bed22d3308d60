"""Parse pairs that are token ids already, under TRL's column names, and check them against the chat format. Pure.

prompt_ids, chosen_ids, rejected_ids    the prompt with its assistant header, and the two completions (TRL's DPOTrainer)
chosen_ids, rejected_ids                two conversations (TRL's RewardTrainer), whose prompt ends with their last
                                        assistant header. Earlier names: chosen_input_ids, rejected_input_ids;
                                        input_ids_chosen, input_ids_rejected

A reader cannot see that an id is wrong, so these rows must have everything that chat.py gives the other rows: one
begin-of-sequence token if the template writes one, the template's assistant header, and completions that end with the
end-of-turn token, where the score is read, and hold it only there. The length limits of all rows apply to them too.
"""

from collections.abc import Mapping
from typing import Any

from rm_robust.data.chat import ChatFormat
from rm_robust.data.records import TokenGroup
from rm_robust.data.rows import ID_COLUMNS
from rm_robust.errors import DataError


def holds_ids(row: Mapping[str, Any]) -> bool:
    return any(row.get(chosen) is not None and row.get(rejected) is not None for chosen, rejected in ID_COLUMNS)


def parse_id_pair(row: Mapping[str, Any], chat: ChatFormat) -> TokenGroup:
    """Return the ids of the prompt and of both completions, the chosen one first. Raises DataError with the reason."""
    chosen_name, rejected_name = next(
        names for names in ID_COLUMNS if row.get(names[0]) is not None and row.get(names[1]) is not None
    )
    chosen, rejected = _ids(row, chosen_name, chat), _ids(row, rejected_name, chat)
    if row.get("prompt_ids") is not None:
        prompt = _ids(row, "prompt_ids", chat)
    else:
        prompt, chosen, rejected = _split(chosen, rejected, chat, names=(chosen_name, rejected_name))
    _check_prompt(prompt, chat)
    for name, ids in ((chosen_name, chosen), (rejected_name, rejected)):
        _check_completion(ids, name, chat)
    return TokenGroup(prompt, [chosen, rejected])


def _ids(row: Mapping[str, Any], name: str, chat: ChatFormat) -> list[int]:
    ids, vocabulary = row[name], len(chat.tokenizer)
    if not isinstance(ids, list) or not ids:
        raise DataError(
            f"{name} is {'an empty list' if ids == [] else 'a ' + type(ids).__name__}; it must be a list of token ids"
        )
    foreign = [
        token for token in ids if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < vocabulary
    ]
    if foreign:
        raise DataError(
            f"{name} holds {foreign[0]!r}, which is no id of the tokenizer in {chat.source} (0 to {vocabulary - 1}); "
            "was it made with another tokenizer?"
        )
    if chat.pad_id in ids:
        raise DataError(f"{name} holds the pad token ({chat.pad_id}); give the ids without padding")
    return list(ids)


def _split(
    chosen: list[int], rejected: list[int], chat: ChatFormat, *, names: tuple[str, str]
) -> tuple[list[int], list[int], list[int]]:
    """Split two conversations after their last assistant header into one prompt and two completions."""
    cuts = [_end_of_last(chat.header_ids, ids) for ids in (chosen, rejected)]
    for name, cut in zip(names, cuts, strict=True):
        if not cut:
            raise DataError(
                f"{name} holds no assistant header of {chat.source} {chat.header_ids}; tokenise with its chat "
                "template, or give the prompt in a column prompt_ids"
            )
    if chosen[: cuts[0]] != rejected[: cuts[1]]:
        raise DataError(
            f"{names[0]} and {names[1]} differ before their last assistant turn, so they are not two answers to one "
            "prompt"
        )
    return chosen[: cuts[0]], chosen[cuts[0] :], rejected[cuts[1] :]


def _end_of_last(part: list[int], ids: list[int]) -> int:
    """Return the index where the last occurrence of `part` in `ids` ends; 0 if there is none."""
    ends = range(len(ids), len(part) - 1, -1) if part else ()
    return next((end for end in ends if ids[end - len(part) : end] == part), 0)


def _check_prompt(prompt: list[int], chat: ChatFormat) -> None:
    num_bos = next((index for index, token in enumerate(prompt) if token != chat.tokenizer.bos_token_id), len(prompt))
    if num_bos != len(chat.bos_ids):
        raise DataError(
            f"the prompt's ids begin with {num_bos} begin-of-sequence tokens, but the template of {chat.source} writes "
            f"{len(chat.bos_ids)}"
        )
    if chat.header_ids and prompt[-len(chat.header_ids) :] != chat.header_ids:
        raise DataError(
            f"prompt_ids end in {prompt[-len(chat.header_ids) :]}, not in the assistant header of {chat.source} "
            f"{chat.header_ids}"
        )


def _check_completion(completion: list[int], name: str, chat: ChatFormat) -> None:
    end = chat.end_of_turn_id
    if end not in completion:
        raise DataError(
            f"{name} does not end in the end-of-turn token ({end}), where the score is read; was it truncated?"
        )
    num_after = len(completion) - 1 - completion.index(end)
    if num_after:
        raise DataError(
            f"{name} goes on for {num_after} tokens after the end-of-turn token ({end}), where the score is read; "
            "cut it there"
        )
    chat.check_completion_ids(completion[:-1], name)
