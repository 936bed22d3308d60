"""Check that tokenised rows are read as they were written, in an order that does not depend on the files."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rm_robust.data.records import TokenGroup
from rm_robust.data.token_files import TOKEN_SCHEMA, TokenisedGroup, read_token_groups
from rm_robust.errors import DataError


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
