"""Check which token rows one row becomes, and that each is kept or dropped with a reason."""

import functools
import json
from itertools import combinations
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rm_robust.config.data import Overlong
from rm_robust.data.chat import ChatFormat
from rm_robust.data.rows import RowKind
from rm_robust.data.token_rows import STAGED_SCHEMA, TokenLimits, fit_prompt, tokenise_text
from tests.support.tiny_models import TEXT, tiny_tokenizer
from tests.unit.data.test_chat import llama

LIMITS = TokenLimits(max_prompt_tokens=60, max_completion_tokens=20, max_dropped_fraction=0.0)
PAIR = {"prompt": "red", "chosen": "green", "rejected": "seven", "margin": 0.5, "chosen_model": "m"}
WORDS = TEXT.split()


@functools.cache
def chat() -> ChatFormat:
    return ChatFormat(tiny_tokenizer(), source="tiny")


def tokenise_all(
    row: object, kind: RowKind | None, *, limits: TokenLimits = LIMITS, weight: float = 1.0
) -> list[dict[str, Any]]:
    text = row if isinstance(row, str) else json.dumps(row)
    return tokenise_text(text, scenario="train", kind=kind, chat=chat(), limits=limits, weight=weight)


def tokenise(row: object, kind: RowKind | None = RowKind.PAIR, *, limits: TokenLimits = LIMITS) -> dict[str, Any]:
    (token_row,) = tokenise_all(row, kind, limits=limits)
    return token_row


def ids_of_pair() -> dict[str, Any]:
    return {
        "prompt_ids": chat().prompt_ids("red"),
        "chosen_ids": chat().completion_ids("green"),
        "rejected_ids": chat().completion_ids("seven"),
    }


def test_a_kept_row_has_the_ids_of_chat_and_everything_else_of_its_group() -> None:
    row = tokenise(PAIR)
    assert row["prompt_ids"] == chat().prompt_ids("red")
    assert row["completion_ids"] == [chat().completion_ids("green"), chat().completion_ids("seven")]
    assert (row["scenario"], row["gold_scores"], row["models"], row["margin"], row["drop_reason"]) == (
        "train",
        [1.0, 0.0],
        ["m", ""],
        0.5,
        "",
    )
    assert (row["weight"], row["num_rows_read"], row["truncation"], row["row_text"]) == (1.0, 1, "", "")
    assert json.loads(row["prompt_json"]) == [{"role": "user", "content": "red"}]


def test_kept_and_dropped_rows_fit_one_schema() -> None:
    table = pa.Table.from_pylist(
        [tokenise(PAIR), tokenise("{"), tokenise({"prompt": "red"}, RowKind.PROMPT)], schema=STAGED_SCHEMA
    )
    assert table.num_rows == 3


def test_the_limits_are_inclusive_and_count_the_end_of_turn() -> None:
    num_prompt, num_completion = len(chat().prompt_ids("red")), len(chat().completion_ids("green"))
    assert chat().completion_ids("green")[-1] == chat().end_of_turn_id
    exact = TokenLimits(num_prompt, max(num_completion, len(chat().completion_ids("seven"))), 0.0)
    for row in (PAIR, ids_of_pair()):
        assert tokenise(row, limits=exact)["drop_reason"] == ""
        assert tokenise(row, limits=TokenLimits(num_prompt - 1, 20, 0.0))["drop_reason"] == "prompt too long"
        assert (
            tokenise(row, limits=TokenLimits(num_prompt, num_completion - 1, 0.0))["drop_reason"]
            == "completion too long"
        )


@pytest.mark.parametrize(
    ("row", "kind", "reason"),
    [
        ({**PAIR, "rejected": "green"}, RowKind.PAIR, "identical completions"),
        (
            {"prompt": "x", "completions": ["a", "b", "a"], "gold_scores": [1, 2, 3]},
            RowKind.RANKED,
            "identical completions",
        ),
        ({**PAIR, "chosen": "red " * 50}, RowKind.PAIR, "completion too long"),
        ({**PAIR, "prompt": "red " * 90}, RowKind.PAIR, "prompt too long"),
        ({**PAIR, "prompt": "red " * 90}, RowKind.TRAINING_PAIRS, "prompt too long"),
        (
            {"prompt": "red " * 90, "completions": ["a", "b", "c"], "ranks": [1, 2, 3]},
            RowKind.TRAINING_PAIRS,
            "prompt too long",
        ),
        ({**PAIR, "rejected": None}, RowKind.PAIR, "malformed: column 'rejected' is missing or null"),
        ({**PAIR, "rejected": None}, RowKind.TRAINING_PAIRS, "malformed: column 'rejected' is missing or null"),
        (
            {**PAIR, "chosen_ids": [1], "rejected_ids": [2]},
            RowKind.PAIR,
            "malformed: chosen_ids holds no assistant header",
        ),
        ('{"prompt": "x", "chosen"', RowKind.PAIR, "malformed: not JSON"),
        ("[1]", RowKind.PAIR, "malformed: a row must be a JSON object, got a list"),
        ("[" * 100_000, RowKind.PAIR, "malformed: not JSON"),
        ('{"prompt": ' + "1" * 5000 + "}", RowKind.PAIR, "malformed: not JSON"),
        (
            '{"prompt": "\\ud800", "chosen": "a", "rejected": "b"}',
            RowKind.PAIR,
            "malformed: Message 0 is not valid Unicode",
        ),
        (
            '{"prompt": "x", "chosen": "\\ud800", "rejected": "b"}',
            RowKind.PAIR,
            "malformed: The completion is not valid Unicode",
        ),
        ({"text": "x"}, None, "malformed: Columns ['text'] are neither pairs"),
    ],
)
def test_a_dropped_row_has_its_reason_the_beginning_of_its_text_and_no_ids(
    row: object, kind: RowKind | None, reason: str
) -> None:
    dropped = tokenise(row, kind)
    assert dropped["drop_reason"].startswith(reason)
    assert len(dropped["drop_reason"]) <= 300
    assert dropped["row_text"] == (row if isinstance(row, str) else json.dumps(row))[:300]
    assert (dropped["scenario"], dropped["num_rows_read"], dropped["prompt_ids"], dropped["completion_ids"]) == (
        "train",
        1,
        [],
        [],
    )


def test_without_a_kind_the_columns_tell_pairs_from_rankings() -> None:
    assert tokenise(PAIR, None)["gold_scores"] == [1.0, 0.0]
    assert tokenise(ids_of_pair(), None)["gold_scores"] == [1.0, 0.0]
    assert tokenise({"prompt": "x", "completions": ["a", "b"], "gold_scores": [2, 3]}, None)["gold_scores"] == [
        2.0,
        3.0,
    ]
    assert tokenise({"prompt": "x", "completions": ["a", "b"], "ranks": [2, 1], "chosen": None}, None)[
        "gold_scores"
    ] == [-2.0, -1.0]


def test_a_pair_of_ids_becomes_what_its_text_becomes_but_for_the_prompts_text() -> None:
    from_text, from_ids = tokenise(PAIR), tokenise(ids_of_pair() | {"margin": 0.5, "chosen_model": "m"})
    same = set(from_text) - {"group_id", "prompt_json"}
    assert {name: from_ids[name] for name in same} == {name: from_text[name] for name in same}
    assert from_ids["prompt_json"] == "[]"
    assert from_ids["group_id"] != tokenise(ids_of_pair() | {"rejected_ids": chat().completion_ids("red")})["group_id"]


# Rankings in training pairs

SCORES = st.lists(st.sampled_from([0, 1, 2, 3.5]), min_size=2, max_size=6)


def ranking(scores: list[float], **columns: object) -> dict[str, Any]:
    return {"prompt_id": "p", "prompt": "x", "completions": WORDS[: len(scores)], "gold_scores": scores, **columns}


@given(SCORES, st.sampled_from([1.0, 2.5]))
def test_a_ranking_gives_every_pair_with_different_scores_once_the_better_one_chosen(
    scores: list[float], weight: float
) -> None:
    rows = tokenise_all(ranking(scores), RowKind.TRAINING_PAIRS, weight=weight)
    kept = [row for row in rows if not row["drop_reason"]]
    expected = {(WORDS[i], WORDS[j]) for i in range(len(scores)) for j in range(len(scores)) if scores[i] > scores[j]}
    pairs = [tuple(chat().completion_text(ids) for ids in row["completion_ids"]) for row in kept]
    assert (len(pairs), set(pairs)) == (len(expected), expected)
    assert len({row["group_id"] for row in kept}) == len(kept)
    assert all(row["gold_scores"] == [1.0, 0.0] and row["prompt_ids"] == chat().prompt_ids("x") for row in kept)
    num_tied = sum(a == b for a, b in combinations(scores, 2))
    assert [row["drop_reason"] for row in rows if row["drop_reason"]] == ["tied scores"] * num_tied
    assert sum(row["num_rows_read"] for row in rows) == 1


@given(SCORES.filter(lambda scores: len(set(scores)) > 1), st.sampled_from([1.0, 0.25, 3.0]))
def test_every_prompt_weighs_the_same_however_many_pairs_it_gives(scores: list[float], weight: float) -> None:
    weights = [
        row["weight"]
        for row in tokenise_all(ranking(scores), RowKind.TRAINING_PAIRS, weight=weight)
        if not row["drop_reason"]
    ]
    assert len(set(weights)) == 1
    assert sum(weights) == pytest.approx(weight)
    (plain,) = tokenise_all(PAIR, RowKind.TRAINING_PAIRS, weight=weight)
    assert plain["weight"] == weight


@given(SCORES)
def test_ranks_order_as_the_scores_that_they_are_ranks_of(scores: list[float]) -> None:
    best_first = sorted(set(scores), reverse=True)
    ranks = [best_first.index(score) + 1 for score in scores]
    by_rank = tokenise_all(ranking(scores, gold_scores=None, ranks=ranks), RowKind.TRAINING_PAIRS)
    by_score = tokenise_all(ranking(scores), RowKind.TRAINING_PAIRS)
    assert [row | {"row_text": ""} for row in by_rank] == [row | {"row_text": ""} for row in by_score]


def test_a_completion_that_cannot_be_used_costs_a_ranking_only_its_own_pairs() -> None:
    rows = tokenise_all(
        ranking([1, 2, 3, 4], completions=["red", "green " * 50, "seven", "red"]), RowKind.TRAINING_PAIRS
    )
    reasons = [row["drop_reason"] for row in rows]
    assert (reasons.count("completion too long"), reasons.count("identical completions"), reasons.count("")) == (
        3,
        1,
        2,
    )
    assert [row["weight"] for row in rows if not row["drop_reason"]] == [0.5, 0.5]


def test_a_ranking_to_evaluate_on_stays_whole() -> None:
    for kind in (None, RowKind.RANKED):
        row = tokenise(ranking([1, 2, 2]), kind)
        assert (row["gold_scores"], len(row["completion_ids"]), row["weight"]) == ([1.0, 2.0, 2.0], 3, 1.0)


# Prompts that are too long

LONG = " ".join(WORDS * 4)
CUT = Overlong.TRUNCATE_PROMPT_LEFT


@pytest.mark.parametrize("chat_format", [chat, llama])
@given(num_words=st.integers(1, len(WORDS)), max_tokens=st.integers(4, 80))
def test_a_cut_prompt_fits_and_keeps_its_begin_its_last_tokens_and_its_header(
    chat_format: Any, num_words: int, max_tokens: int
) -> None:
    template = chat_format()
    prompt_ids = template.prompt_ids(" ".join(WORDS[:num_words]))
    cut = fit_prompt(prompt_ids, template, TokenLimits(max_tokens, 20, 0.0, CUT))
    num_bos, num_header = len(template.bos_ids), len(template.header_ids)
    if len(prompt_ids) <= max_tokens or max_tokens <= num_bos + num_header:
        assert cut == prompt_ids
    else:
        assert len(cut) == max_tokens
        assert cut[:num_bos] == template.bos_ids == prompt_ids[:num_bos]
        assert cut[num_bos:] == prompt_ids[num_bos - max_tokens :]
        assert cut[-num_header:] == template.header_ids


def test_a_template_with_a_begin_of_sequence_token_is_told_from_one_without() -> None:
    assert chat().bos_ids == []
    assert llama().bos_ids == [llama().tokenizer.bos_token_id]


@pytest.mark.parametrize("kind", [RowKind.PAIR, RowKind.TRAINING_PAIRS, None])
def test_a_truncated_pair_keeps_its_completions_and_says_what_is_left(kind: RowKind | None) -> None:
    """The released code cuts prompts on the right, through the assistant header, or not at all.

    (Its max_length has no effect on token ids.)
    """
    row = tokenise({**PAIR, "prompt": LONG}, kind, limits=TokenLimits(30, 20, 0.0, CUT))
    long_ids = chat().prompt_ids(LONG)
    assert (row["drop_reason"], row["prompt_ids"]) == ("", long_ids[-30:])
    assert row["completion_ids"] == tokenise(PAIR)["completion_ids"]
    assert row["truncation"] == f"prompt truncated: the last 30 of {len(long_ids)} tokens are left"
    assert row["row_text"] == json.dumps({**PAIR, "prompt": LONG})[:300]


def test_ids_are_cut_as_text_is() -> None:
    limits = TokenLimits(30, 20, 0.0, CUT)
    from_ids = tokenise({**ids_of_pair(), "prompt_ids": chat().prompt_ids(LONG)}, limits=limits)
    assert from_ids["prompt_ids"] == tokenise({**PAIR, "prompt": LONG}, limits=limits)["prompt_ids"]
    assert from_ids["truncation"]


def test_a_long_completion_is_dropped_whatever_becomes_of_prompts() -> None:
    row = tokenise({**PAIR, "rejected": LONG}, limits=TokenLimits(30, 20, 0.0, CUT))
    assert row["drop_reason"] == "completion too long"


def test_a_prompt_is_dropped_where_nothing_but_the_template_would_be_left_and_where_rloo_samples_from_it() -> None:
    num_header = len(chat().header_ids)
    assert (
        tokenise({**PAIR, "prompt": LONG}, limits=TokenLimits(num_header, 20, 0.0, CUT))["drop_reason"]
        == "prompt too long"
    )
    assert tokenise({**PAIR, "prompt": LONG}, limits=TokenLimits(num_header + 1, 20, 0.0, CUT))["drop_reason"] == ""
    assert (
        tokenise({"prompt": LONG}, RowKind.PROMPT, limits=TokenLimits(30, 20, 0.0, CUT))["drop_reason"]
        == "prompt too long"
    )
