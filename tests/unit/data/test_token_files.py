"""Check that tokenised rows are read as they were written, in an order that does not depend on the files."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rm_robust.data.chat import ChatFormat
from rm_robust.data.records import TokenGroup
from rm_robust.data.rows import RowKind
from rm_robust.data.token_files import TOKEN_SCHEMA, TokenisedGroup, read_token_groups
from rm_robust.errors import DataError
from tests.support.tiny_models import save_tiny_language_model, write_token_groups


def write_rows(path: Path, group_ids: list[str]) -> None:
    rows = [
        {
            "group_id": i,
            "prompt_json": json.dumps([{"role": "user", "content": i}]),
            "prompt_ids": [7],
            "completion_ids": [[8], [9, 2]],
            "gold_scores": [1.0, 0.0],
            "margin": 0.5,
            "weight": 0.25,
        }
        for i in group_ids
    ]
    pq.write_table(pa.Table.from_pylist(rows, schema=TOKEN_SCHEMA), path)


def test_groups_are_read_whole_and_sorted_over_all_files(tmp_path: Path) -> None:
    write_rows(tmp_path / "part-0.parquet", ["c", "a"])
    write_rows(tmp_path / "part-1.parquet", ["b"])
    groups = read_token_groups(tmp_path)
    assert [group.group_id for group in groups] == ["a", "b", "c"]
    assert groups[0] == TokenisedGroup(
        "a", [{"role": "user", "content": "a"}], TokenGroup([7], [[8], [9, 2]]), [1.0, 0.0], margin=0.5, weight=0.25
    )


def test_missing_and_empty_folders_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no tokenised rows at .*nothing: run the stage"):
        read_token_groups(tmp_path / "nothing")
    write_rows(tmp_path / "part-0.parquet", [])
    with pytest.raises(DataError, match="holds no row"):
        read_token_groups(tmp_path)


def test_the_columns_of_a_prompts_row_are_kept_and_a_row_that_lacks_one_has_none(tmp_path: Path) -> None:
    chat = ChatFormat.load(save_tiny_language_model(tmp_path / "model"))
    rows: list[dict[str, object]] = [
        {"prompt_id": "a", "prompt": "red", "answer": "4", "tests": [{"in": 1}]},
        {"prompt_id": "b", "prompt": [{"role": "user", "content": "blue"}], "level": 2},
    ]
    write_token_groups(tmp_path / "rloo_prompts", rows, kind=RowKind.PROMPT, chat=chat)
    names = ("answer", "level", "prompt", "prompt_id", "tests")
    assert [group.columns for group in read_token_groups(tmp_path / "rloo_prompts")] == [
        {name: row.get(name) for name in names} for row in rows
    ]


def test_rows_of_an_earlier_version_have_no_columns(tmp_path: Path) -> None:
    write_rows(tmp_path / "part-0.parquet", ["a"])
    table = pq.read_table(tmp_path / "part-0.parquet")
    pq.write_table(table.drop_columns(["columns_json"]), tmp_path / "part-0.parquet")
    assert read_token_groups(tmp_path)[0].columns == {}
