"""What becomes of one row, which files are read, and how lines are cut. The Ray Data part is in tests/component."""

import functools
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from rm_robust import data_pipeline
from rm_robust.chat import ChatFormat
from rm_robust.data_pipeline import Source, TokenLimits, check_sources, list_files, read_lines, tokenise_text
from rm_robust.errors import DataError
from rm_robust.rows import RowKind
from rm_robust.token_files import TOKEN_SCHEMA
from tests.tiny_models import tiny_tokenizer

LIMITS = TokenLimits(max_prompt_tokens=60, max_completion_tokens=20, max_dropped_fraction=0.0)


@functools.cache
def chat() -> ChatFormat:
    return ChatFormat(tiny_tokenizer(), source="tiny")


def tokenise(row: object, kind: RowKind | None = RowKind.PAIR, limits: TokenLimits = LIMITS) -> dict[str, Any]:
    text = row if isinstance(row, str) else json.dumps(row)
    return tokenise_text(text, scenario="train", kind=kind, chat=chat(), limits=limits)


PAIR = {"prompt": "red", "chosen": "green", "rejected": "seven", "margin": 0.5, "chosen_model": "m"}


def test_a_kept_row_has_the_ids_of_chat_and_everything_else_of_its_group() -> None:
    row = tokenise(PAIR)
    assert row["prompt_ids"] == chat().prompt_ids("red")
    assert row["completion_ids"] == [chat().completion_ids("green"), chat().completion_ids("seven")]
    assert (row["scenario"], row["gold_scores"], row["models"], row["margin"], row["drop_reason"]) == ("train", [1.0, 0.0], ["m", ""], 0.5, "")
    assert json.loads(row["prompt_json"]) == [{"role": "user", "content": "red"}]


def test_kept_and_dropped_rows_fit_one_schema() -> None:
    table = pa.Table.from_pylist([tokenise(PAIR), tokenise("{"), tokenise({"prompt": "red"}, RowKind.PROMPT)], schema=TOKEN_SCHEMA)
    assert table.num_rows == 3


def test_the_limits_are_inclusive_and_count_the_end_of_turn() -> None:
    num_prompt, num_completion = len(chat().prompt_ids("red")), len(chat().completion_ids("green"))
    assert chat().completion_ids("green")[-1] == chat().end_of_turn_id
    exact = TokenLimits(num_prompt, max(num_completion, len(chat().completion_ids("seven"))), 0.0)
    assert tokenise(PAIR, limits=exact)["drop_reason"] == ""
    assert tokenise(PAIR, limits=TokenLimits(num_prompt - 1, 20, 0.0))["drop_reason"] == "prompt too long"
    assert tokenise(PAIR, limits=TokenLimits(num_prompt, num_completion - 1, 0.0))["drop_reason"] == "completion too long"


@pytest.mark.parametrize(
    ("row", "kind", "reason"),
    [
        ({**PAIR, "rejected": "green"}, RowKind.PAIR, "identical completions"),
        ({"prompt": "x", "completions": ["a", "b", "a"], "gold_scores": [1, 2, 3]}, RowKind.RANKED, "identical completions"),
        ({**PAIR, "chosen": "red " * 50}, RowKind.PAIR, "completion too long"),
        ({**PAIR, "prompt": "red " * 90}, RowKind.PAIR, "prompt too long"),
        ({**PAIR, "rejected": None}, RowKind.PAIR, "malformed: column 'rejected' is missing or null"),
        ('{"prompt": "x", "chosen"', RowKind.PAIR, "malformed: not JSON"),
        ("[1]", RowKind.PAIR, "malformed: a row must be a JSON object, got a list"),
        ("[" * 100_000, RowKind.PAIR, "malformed: not JSON"),
        ('{"prompt": ' + "1" * 5000 + "}", RowKind.PAIR, "malformed: not JSON"),
        ('{"prompt": "\\ud800", "chosen": "a", "rejected": "b"}', RowKind.PAIR, "malformed: Message 0 is not valid Unicode"),
        ('{"prompt": "x", "chosen": "\\ud800", "rejected": "b"}', RowKind.PAIR, "malformed: The completion is not valid Unicode"),
        ({"text": "x"}, None, "malformed: Columns ['text'] are neither pairs"),
    ],
)
def test_a_dropped_row_has_its_reason_the_beginning_of_its_text_and_no_ids(row: object, kind: RowKind | None, reason: str) -> None:
    dropped = tokenise(row, kind)
    assert dropped["drop_reason"].startswith(reason)
    assert len(dropped["drop_reason"]) <= 300
    assert dropped["row_text"] == (row if isinstance(row, str) else json.dumps(row))[:300]
    assert (dropped["scenario"], dropped["prompt_ids"], dropped["completion_ids"]) == ("train", [], [])


def test_without_a_kind_the_columns_tell_pairs_from_rankings() -> None:
    assert tokenise(PAIR, None)["gold_scores"] == [1.0, 0.0]
    assert tokenise({"prompt": "x", "completions": ["a", "b"], "gold_scores": [2, 3]}, None)["gold_scores"] == [2.0, 3.0]


LINES = ['{"a": "\u2028 \x85 \x0b"}', "", '{"b": 2}', "x" * 50, '{"c": 3}']


def test_lines_end_at_newlines_only_and_other_encodings_are_marked(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes("\n".join(LINES).encode() + b"\r\n\xff\xfe{}")
    lines = list(read_lines(file))
    assert lines[:-1] == LINES
    assert lines[-1].startswith("not UTF-8: ")


@pytest.mark.parametrize("part_bytes", [1, 2, 7, 30, 52, 10_000])
@pytest.mark.parametrize("end", ["", "\n"])
def test_reading_a_file_in_pieces_gives_every_line_once_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part_bytes: int, end: str) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(LINES) + end, encoding="utf-8")
    monkeypatch.setattr(data_pipeline, "_PART_BYTES", part_bytes)
    pieces = [{"path": str(file), "start": start} for start in range(0, file.stat().st_size, part_bytes)]
    texts = [text for piece in pieces for text in data_pipeline._lines_of_pieces(pa.Table.from_pylist([piece]))["text"].to_pylist()]
    assert texts == [line for line in LINES if line]


def test_a_source_is_a_file_or_a_folder_of_jsonl_and_parquet(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.parquet", "notes.txt", "deep/c.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    assert [file.name for file in list_files(str(tmp_path))] == ["a.parquet", "b.jsonl", "c.jsonl"]
    assert list_files(str(tmp_path / "b.jsonl")) == [tmp_path / "b.jsonl"]


def test_missing_empty_and_foreign_sources_are_refused_by_path(tmp_path: Path) -> None:
    def refusal(path: Path) -> str:
        with pytest.raises(DataError) as refused:
            check_sources([Source("train", (str(path),), RowKind.PAIR)])
        return str(refused.value)

    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "rows.csv").write_text("a,b")
    (tmp_path / "folder").mkdir()
    assert refusal(tmp_path / "nothing.jsonl") == f"There is no file or folder at {tmp_path}/nothing.jsonl."
    assert refusal(tmp_path / "empty.jsonl") == f"{tmp_path}/empty.jsonl (train) is empty: there is no row in it."
    for name in ("rows.csv", "folder"):
        assert refusal(tmp_path / name) == f"{tmp_path}/{name} must be a .jsonl or .parquet file, or a folder with such files."
    check_sources([Source("train", ("hub:owner/name",), RowKind.PAIR)])
