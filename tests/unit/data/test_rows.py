"""Check what each kind of row in a user's file means, and that every other row is refused with a reason."""

import contextlib
import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rm_robust.data.rows import RowKind, finite_number, kind_of, parse_row
from rm_robust.errors import DataError

USER = {"role": "user", "content": "Name a colour."}
PROMPT = [USER]


def turn(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Name a colour.", "chosen": "red", "rejected": "seven"},
        {"prompt": PROMPT, "chosen": "red", "rejected": "seven"},
        {"prompt": PROMPT, "chosen": [turn("red")], "rejected": [turn("seven")]},
        {"chosen": [USER, turn("red")], "rejected": [USER, turn("seven")]},
        {
            "prompt": None,
            "chosen": [USER, turn("red")],
            "rejected": [USER, turn("seven")],
            "margin": None,
            "chosen_model": None,
        },
        {
            "prompt": "Name a colour.",
            "chosen": [USER, turn("red")],
            "rejected": [USER, turn("seven")],
            "score_chosen": 8.0,
        },
        {"chosen": [{**USER, "name": None}, turn("red")], "rejected": [USER, turn("seven")]},
    ],
)
def test_every_usual_form_of_a_pair_means_the_same_group(row: dict[str, Any]) -> None:
    group = parse_row(row, RowKind.PAIR)
    assert (group.prompt, group.completions, group.gold_scores) == (PROMPT, ["red", "seven"], [1.0, 0.0])
    assert (group.models, group.margin) == (["", ""], None)
    assert (
        group.group_id
        == parse_row({"prompt": "Name a colour.", "chosen": "red", "rejected": "seven"}, RowKind.PAIR).group_id
    )


def test_a_pair_keeps_its_margin_models_and_id() -> None:
    row = {
        "prompt": "x",
        "chosen": "a",
        "rejected": "b",
        "margin": 2,
        "chosen_model": "m1",
        "rejected_model": "m2",
        "pair_id": 7,
    }
    group = parse_row(row, RowKind.PAIR)
    assert (group.margin, group.models, group.group_id) == (2.0, ["m1", "m2"], "7")


def test_swapping_chosen_and_rejected_is_another_pair() -> None:
    ids = {
        parse_row({"prompt": "x", "chosen": a, "rejected": b}, RowKind.PAIR).group_id
        for a, b in (("p", "q"), ("q", "p"))
    }
    assert len(ids) == 2


def test_ranked_rows_keep_the_order_of_completions_scores_and_models() -> None:
    row = {
        "prompt": "Name a colour.",
        "completions": ["b", "a"],
        "gold_scores": [0, 1.5],
        "models": ["m2", "m1"],
        "prompt_id": "p",
    }
    group = parse_row(row, RowKind.RANKED)
    assert (group.group_id, group.prompt, group.completions, group.gold_scores, group.models) == (
        "p",
        PROMPT,
        ["b", "a"],
        [0.0, 1.5],
        ["m2", "m1"],
    )


def test_the_lowest_rank_is_the_best_score() -> None:
    row = {"prompt": "Name a colour.", "completions": ["b", "a", "c"], "ranks": [2, 1, 2]}
    for kind in (RowKind.RANKED, RowKind.TRAINING_PAIRS, None):
        assert parse_row(row, kind).gold_scores == [-2.0, -1.0, -2.0]


def test_training_pairs_are_pairs_where_both_forms_are_given() -> None:
    row = {"prompt": "x", "chosen": "a", "rejected": "b", "completions": ["a", "b", "c"], "gold_scores": [1, 2, 3]}
    assert parse_row(row, RowKind.TRAINING_PAIRS) == parse_row(row, RowKind.PAIR)


def test_the_released_files_are_ranked_rows_in_the_order_of_their_response_numbers() -> None:
    responses = {f"response_{number}_text": f"completion {number}" for number in (10, 2, 1)}
    row = {"instruction": "Name a colour.", **responses, "response_2_model": "m", "all_scores": [1, 2, 10]}
    group = parse_row(row, RowKind.RANKED)
    assert (group.prompt, group.completions) == (PROMPT, ["completion 1", "completion 2", "completion 10"])
    assert group.gold_scores == [1.0, 2.0, 10.0]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Name a colour.", "completion": "red"},
        {"prompt": PROMPT, "completion": [turn("red")]},
        {"messages": [USER, turn("red")]},
        {"messages": [USER, turn("red")], "prompt": "not read"},
    ],
)
def test_every_usual_form_of_a_demonstration_means_the_same_group(row: dict[str, Any]) -> None:
    group = parse_row(row, RowKind.DEMONSTRATION)
    assert (group.prompt, group.completions) == (PROMPT, ["red"])


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Name a colour.", "chosen": "red", "rejected": "seven"},
        {"chosen": [USER, turn("red")], "rejected": [USER, turn("seven")]},
    ],
)
def test_of_a_pair_the_chosen_completion_is_a_demonstration(row: dict[str, Any]) -> None:
    group = parse_row(row, RowKind.DEMONSTRATION)
    assert group == parse_row({"prompt": "Name a colour.", "completion": "red"}, RowKind.DEMONSTRATION)
    with pytest.raises(DataError, match="'completion' is missing"):
        parse_row({"prompt": "Name a colour."}, RowKind.DEMONSTRATION)


def test_a_prompt_row_has_no_completion() -> None:
    group = parse_row({"prompt": "Name a colour.", "completion": "not read"}, RowKind.PROMPT)
    assert (group.prompt, group.completions, group.gold_scores) == (PROMPT, [], [])


@pytest.mark.parametrize(
    ("kind", "row", "reason"),
    [
        (RowKind.PAIR, {"prompt": "x", "chosen": "a"}, "column 'rejected' is missing or null"),
        (RowKind.PAIR, {"prompt": "x", "chosen": "a", "rejected": 3}, "rejected is a int"),
        (
            RowKind.PAIR,
            {"prompt": "x", "chosen": [turn("a"), turn("b")], "rejected": [turn("a"), turn("c")]},
            "must end with a user message",
        ),
        (
            RowKind.PAIR,
            {"chosen": [USER, turn("a")], "rejected": [{**USER, "content": "?"}, turn("b")]},
            "differ before their last turn",
        ),
        (RowKind.PAIR, {"chosen": "a", "rejected": "b"}, "chosen is text and there is no prompt"),
        (RowKind.PAIR, {"chosen": [turn("a")], "rejected": [turn("b")]}, "chosen must be a list of messages"),
        (RowKind.PAIR, {"prompt": "x", "chosen": "a", "rejected": "b", "margin": float("nan")}, "margin is nan"),
        (RowKind.PAIR, {"prompt": "", "chosen": "a", "rejected": "b"}, "last user message of a prompt is empty"),
        (
            RowKind.RANKED,
            {"prompt": "x", "completions": ["a", "b"], "gold_scores": [1.0]},
            "2 completions with 1 gold scores",
        ),
        (RowKind.RANKED, {"prompt": "x", "completions": ["a"], "gold_scores": [1.0]}, "at least two of each"),
        (
            RowKind.RANKED,
            {"prompt": "x", "completions": "ab", "gold_scores": [1.0, 2.0]},
            "'completions' is a str; it must be a list",
        ),
        (
            RowKind.RANKED,
            {"prompt": "x", "completions": ["a", "b"], "gold_scores": [1, 2], "ranks": [2, 1]},
            "'gold_scores' and 'ranks' both order",
        ),
        (
            RowKind.RANKED,
            {"prompt": "x", "completions": ["a", "b"], "ranks": [1, "2"]},
            "rank 1 is '2'; it must be a finite number",
        ),
        (
            RowKind.RANKED,
            {"prompt": "x", "completions": ["a", "b"], "ranks": [1]},
            "2 completions with 1 gold scores or ranks",
        ),
        (RowKind.TRAINING_PAIRS, {"prompt": "x", "completions": ["a", "b"]}, "column 'chosen' is missing"),
        (
            RowKind.RANKED,
            {"prompt": "x", "completions": ["a", "b"], "gold_scores": 3},
            "'gold_scores' is a int; it must be a list",
        ),
        (RowKind.RANKED, {"prompt": "x", "completions": ["a", "b"], "gold_scores": [1, None]}, "gold score 1 is None"),
        (
            RowKind.RANKED,
            {"prompt": "x", "completions": ["a", "b"], "gold_scores": [1, 2], "models": "ab"},
            "'models' is a str",
        ),
        (
            RowKind.RANKED,
            {"prompt": "x", "completions": ["a", "b"], "gold_scores": [1, 2], "models": ["m"]},
            "2 completions with 1 model names",
        ),
        (
            RowKind.RANKED,
            {"instruction": "x", "response_one_text": "a", "all_scores": [1, 2]},
            "0 completions with 2 gold scores",
        ),
        (RowKind.DEMONSTRATION, {"messages": [turn("a")]}, "messages must be a list of messages"),
        (RowKind.DEMONSTRATION, {"messages": [USER]}, "ends with the assistant's"),
        (RowKind.DEMONSTRATION, {"prompt": "x"}, "column 'completion' is missing"),
        (RowKind.PROMPT, {"text": "x"}, "column 'prompt' is missing"),
        (RowKind.PROMPT, {"prompt": 5}, "must be text or a list of messages"),
    ],
)
def test_a_row_that_cannot_be_read_gives_its_reason(kind: RowKind, row: dict[str, Any], reason: str) -> None:
    with pytest.raises(DataError) as refused:
        parse_row(row, kind)
    assert reason in str(refused.value)


NAMES = [
    "prompt",
    "ranks",
    "chosen",
    "rejected",
    "margin",
    "completions",
    "gold_scores",
    "models",
    "instruction",
    "all_scores",
]
COLUMNS = [*NAMES, "response_1_text", "response_x_text", "messages", "completion", "role", "content"]
values: st.SearchStrategy[Any] = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.floats(),
        st.text(max_size=3),
        st.just("user"),
        st.just("assistant"),
        st.just(10**400),
    ),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(COLUMNS), inner, max_size=3),
    max_leaves=6,
)


@given(row=st.dictionaries(st.sampled_from(COLUMNS), values), kind=st.sampled_from(RowKind))
def test_any_json_row_gives_a_group_or_a_data_error(row: dict[str, Any], kind: RowKind) -> None:
    parsers: list[Callable[[], object]] = [lambda: parse_row(row, kind), lambda: kind_of(set(row))]
    for parse in parsers:
        with contextlib.suppress(DataError):
            parse()


def test_finite_numbers_are_ints_and_floats_but_no_bools_and_nothing_beyond_a_double() -> None:
    assert finite_number(3, "x") == 3.0
    for value in (True, "3", None, float("inf"), float("nan"), 10**400, json.loads("1e999")):
        with pytest.raises(DataError, match="x is .*finite number"):
            finite_number(value, "x")


def test_kinds_are_told_by_columns() -> None:
    assert kind_of({"chosen", "rejected", "prompt"}) is RowKind.PAIR
    assert (
        kind_of({"chosen_ids", "rejected_ids"}) is kind_of({"input_ids_chosen", "input_ids_rejected"}) is RowKind.PAIR
    )
    assert kind_of({"prompt", "completions", "gold_scores"}) is RowKind.RANKED
    assert kind_of({"prompt", "completions", "ranks"}) is RowKind.RANKED
    assert kind_of({"instruction", "response_1_text", "all_scores"}) is RowKind.RANKED
    with pytest.raises(DataError, match=r"\['prompt', 'text'\] are neither pairs"):
        kind_of({"prompt", "text"})


SYSTEM = {"role": "system", "content": "Be brief."}
TALK = [USER, turn("Which one?"), {"role": "user", "content": "A warm one."}]
HH_PROMPT = "\n\nHuman: Name a colour.\n\nAssistant: Which one?\n\nHuman: A warm one."


def shared(*turns: tuple[str, str]) -> list[dict[str, str]]:
    return [{"from": sender, "value": text} for sender, text in turns]


@pytest.mark.parametrize(
    ("row", "prompt", "completions"),
    [
        # Anthropic/hh-rlhf: chosen and rejected are whole dialogues
        (
            {"chosen": f"{HH_PROMPT}\n\nAssistant: red\n\nHuman!", "rejected": f"{HH_PROMPT}\n\nAssistant: seven"},
            TALK,
            ["red\n\nHuman!", "seven"],
        ),
        (
            {"chosen": f"{HH_PROMPT}\n\nAssistant: red", "rejected": f"{HH_PROMPT}\n\nAssistant:"},
            TALK,
            ["red", ""],
        ),
        # a prompt beside them is their beginning
        (
            {
                "prompt": f"{HH_PROMPT}\n\nAssistant:",
                "chosen": f"{HH_PROMPT}\n\nAssistant: red",
                "rejected": f"{HH_PROMPT}\n\nAssistant: seven",
            },
            TALK,
            ["red", "seven"],
        ),
        # Dahoas/full-hh-rlhf: the prompt ends with the header
        ({"prompt": f"{HH_PROMPT}\n\nAssistant:", "chosen": " red", "rejected": " seven"}, TALK, [" red", " seven"]),
        # LLaMA-Factory's ShareGPT preference format
        (
            {
                "conversations": shared(
                    ("system", "Be brief."),
                    ("human", "Name a colour."),
                    ("gpt", "Which one?"),
                    ("human", "A warm one."),
                ),
                "chosen": {"from": "gpt", "value": "red"},
                "rejected": {"from": "gpt", "value": "seven"},
            },
            [SYSTEM, *TALK],
            ["red", "seven"],
        ),
        (
            {
                "chosen": shared(("human", "Name a colour."), ("gpt", "red")),
                "rejected": shared(("human", "Name a colour."), ("gpt", "seven")),
            },
            PROMPT,
            ["red", "seven"],
        ),
        # a list prompt beside whole conversations, or beside what follows it
        (
            {"prompt": PROMPT, "chosen": [USER, turn("red")], "rejected": [USER, turn("seven")]},
            PROMPT,
            ["red", "seven"],
        ),
        (
            {"prompt": PROMPT, "chosen": [*TALK[1:], turn("red")], "rejected": [*TALK[1:], turn("seven")]},
            TALK,
            ["red", "seven"],
        ),
        # text that only looks like a dialogue stays text
        (
            {"prompt": "Go on:\n\nAssistant:", "chosen": "yes", "rejected": "no"},
            [{"role": "user", "content": "Go on:\n\nAssistant:"}],
            ["yes", "no"],
        ),
        (
            {"prompt": "Human: is it?", "chosen": "Human: yes", "rejected": "no"},
            [{"role": "user", "content": "Human: is it?"}],
            ["Human: yes", "no"],
        ),
    ],
)
def test_the_pairs_that_people_share_are_read(
    row: dict[str, Any], prompt: list[dict[str, str]], completions: list[str]
) -> None:
    group = parse_row(row, RowKind.TRAINING_PAIRS)
    assert (group.prompt, group.completions) == (prompt, completions)
    assert parse_row(row, None) == group, "evaluation reads the same"


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (
            {"chosen": HH_PROMPT, "rejected": f"{HH_PROMPT}\n\nAssistant: seven"},
            "chosen must be .* ends with the assist",
        ),
        ({"chosen": f"{HH_PROMPT}\n\nAssistant: red", "rejected": "seven"}, "rejected must be"),
        ({"chosen": "\n\nAssistant: red", "rejected": "\n\nAssistant: seven"}, "there is no prompt"),
        (
            {"chosen": f"{HH_PROMPT}\n\nAssistant: a", "rejected": "\n\nHuman: Other?\n\nAssistant: b"},
            "differ before their last turn",
        ),
        (
            {"conversations": shared(("human", "x"), ("gpt", "y")), "chosen": "a", "rejected": "b"},
            "must end with a user message",
        ),
        ({"conversations": shared(("narrator", "x")), "chosen": "a", "rejected": "b"}, "narrator"),
        (
            {"prompt": [SYSTEM, USER], "chosen": [USER, turn("red")], "rejected": [USER, turn("seven")]},
            "chosen is a conversation that does not begin with the prompt's messages",
        ),
    ],
)
def test_half_a_shared_format_is_malformed_with_the_reason(row: dict[str, Any], reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        parse_row(row, RowKind.PAIR)


def test_shared_conversations_are_demonstrations_and_prompts() -> None:
    turns = shared(("system", "Be brief."), ("human", "Name a colour."), ("gpt", "red"))
    group = parse_row({"conversations": turns}, RowKind.DEMONSTRATION)
    assert (group.prompt, group.completions) == ([SYSTEM, USER], ["red"])
    assert parse_row({"messages": turns}, RowKind.DEMONSTRATION) == group
    assert parse_row({"conversations": turns[:2]}, RowKind.PROMPT).prompt == [SYSTEM, USER]
    assert parse_row({"prompt": f"{HH_PROMPT}\n\nAssistant:"}, RowKind.PROMPT).prompt == TALK
    with pytest.raises(DataError, match="conversations must be a list of messages that ends with the assistant"):
        parse_row({"conversations": turns[:2]}, RowKind.DEMONSTRATION)
    ranked = {"conversations": turns[:2], "completions": ["red", "blue"], "gold_scores": [2, 1]}
    assert parse_row(ranked, None).prompt == [SYSTEM, USER]
