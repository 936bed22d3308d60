"""Check that pairs of token ids are read under TRL's names, and refused where they would silently get a wrong score."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rm_robust.data.chat import ChatFormat
from rm_robust.data.id_rows import holds_ids, parse_id_pair
from rm_robust.data.records import Message, TokenGroup
from rm_robust.errors import DataError
from tests.unit.data.test_chat import chatml, conversations, llama, words

CONVERSATION_COLUMNS = [
    ("chosen_ids", "rejected_ids"),
    ("chosen_input_ids", "rejected_input_ids"),
    ("input_ids_chosen", "input_ids_rejected"),
]


@given(conversations(words), words, words, st.sampled_from(CONVERSATION_COLUMNS))
def test_whole_conversations_and_ids_apart_give_the_ids_that_the_text_gives(
    prompt: list[Message], chosen: str, rejected: str, names: tuple[str, str]
) -> None:
    for chat in (chatml(), llama()):
        expected = TokenGroup(chat.prompt_ids(prompt), [chat.completion_ids(chosen), chat.completion_ids(rejected)])
        separate = {
            "prompt_ids": expected.prompt_ids,
            "chosen_ids": expected.completion_ids[0],
            "rejected_ids": expected.completion_ids[1],
        }
        conversations = {
            name: expected.prompt_ids + ids for name, ids in zip(names, expected.completion_ids, strict=True)
        }
        for row in (separate, conversations):
            assert holds_ids(row)
            assert parse_id_pair(row, chat) == expected


def test_text_and_null_columns_are_no_ids() -> None:
    assert not holds_ids(
        {
            "prompt": "x",
            "chosen": "a",
            "rejected": "b",
            "chosen_ids": None,
            "rejected_ids": None,
            "input_ids_chosen": [1],
        }
    )


def pair(chat: ChatFormat, **columns: Any) -> dict[str, Any]:
    return {
        "prompt_ids": chat.prompt_ids("red"),
        "chosen_ids": chat.completion_ids("green"),
        "rejected_ids": chat.completion_ids("seven"),
        **columns,
    }


def whole_pair(
    chat: ChatFormat, *, prompts: tuple[str, str] = ("red", "red"), after: tuple[int, ...] = ()
) -> dict[str, Any]:
    chosen, rejected = (
        chat.prompt_ids(prompt) + chat.completion_ids(text)
        for prompt, text in zip(prompts, ("green", "seven"), strict=True)
    )
    return {"chosen_ids": chosen + list(after), "rejected_ids": rejected}


def refusals() -> list[tuple[ChatFormat, dict[str, Any], str]]:
    chat, begin = chatml(), llama().tokenizer.bos_token_id
    green, end, newline = (
        chat.completion_ids("green"),
        chat.end_of_turn_id,
        chat.tokenizer("\n", add_special_tokens=False)["input_ids"],
    )
    vocabulary = len(chat.tokenizer)
    return [
        (
            chat,
            pair(chat, chosen_ids=[vocabulary, end]),
            f"chosen_ids holds {vocabulary}, which is no id of the tokenizer in tiny (0 to {vocabulary - 1})",
        ),
        (chat, pair(chat, rejected_ids=[-100, end]), "rejected_ids holds -100, which is no id"),
        (chat, pair(chat, prompt_ids=[True]), "prompt_ids holds True, which is no id"),
        (chat, pair(chat, prompt_ids=["red"]), "prompt_ids holds 'red', which is no id"),
        (chat, pair(chat, chosen_ids=[]), "chosen_ids is an empty list"),
        (chat, pair(chat, chosen_ids="green"), "chosen_ids is a str"),
        (chat, pair(chat, chosen_ids=[*green, chat.pad_id]), f"chosen_ids holds the pad token ({chat.pad_id})"),
        (
            chat,
            pair(chat, chosen_ids=green[:-1]),
            f"chosen_ids does not end in the end-of-turn token ({end}), where the score is read; was it truncated?",
        ),
        (
            chat,
            pair(chat, rejected_ids=[*green, *newline]),
            f"rejected_ids goes on for 1 tokens after the end-of-turn token ({end})",
        ),
        (
            chat,
            whole_pair(chat, after=tuple(newline)),
            f"chosen_ids goes on for 1 tokens after the end-of-turn token ({end})",
        ),
        (
            chat,
            whole_pair(chat, after=(*newline, end)),
            f"chosen_ids goes on for 2 tokens after the end-of-turn token ({end})",
        ),
        (
            chat,
            whole_pair(chat, prompts=("red", "blue")),
            "chosen_ids and rejected_ids differ before their last assistant turn",
        ),
        (chat, {"chosen_ids": green, "rejected_ids": green}, "chosen_ids holds no assistant header of tiny"),
        (chat, pair(chat, prompt_ids=chat.prompt_ids("red")[:-2]), "not in the assistant header of tiny"),
        (
            llama(),
            pair(llama(), prompt_ids=[begin, *llama().prompt_ids("red")]),
            "begin with 2 begin-of-sequence tokens, but the template of llama writes 1",
        ),
        (
            llama(),
            pair(llama(), prompt_ids=llama().prompt_ids("red")[1:]),
            "begin with 0 begin-of-sequence tokens, but the template of llama writes 1",
        ),
    ]


@pytest.mark.parametrize("number", range(len(refusals())))
def test_ids_that_would_be_scored_wrongly_are_refused_with_the_reason(number: int) -> None:
    chat, row, reason = refusals()[number]
    with pytest.raises(DataError) as refused:
        parse_id_pair(row, chat)
    assert reason in str(refused.value)


@given(
    st.lists(st.integers(-1, 331), max_size=12),
    st.lists(st.integers(-1, 331), max_size=12),
    st.none() | st.lists(st.integers(-1, 331), max_size=12),
)
def test_whatever_ids_are_accepted_have_the_templates_shape(
    chosen: list[int], rejected: list[int], prompt: list[int] | None
) -> None:
    chat = chatml()
    header, end = chat.header_ids, [chat.end_of_turn_id]
    for around in ([], header):
        row = {
            "prompt_ids": prompt and prompt + around,
            "chosen_ids": [*around, *chosen, *end],
            "rejected_ids": [*around, *rejected, *end],
        }
        try:
            tokens = parse_id_pair(row, chat)
        except DataError:
            continue
        assert tokens.prompt_ids[-len(header) :] == header
        assert all(ids.index(chat.end_of_turn_id) == len(ids) - 1 for ids in tokens.completion_ids)
