"""Rows that were appended outlive a kill; a torn last line is never read and never glued to the next one."""

import json
from pathlib import Path

import pytest

from rm_robust.errors import DataError
from rm_robust.runs.lines import append_rows, as_line, end_last_line, rows_of, torn_line

ROWS = [{"n": 1, "text": "a\u2028b"}, {"n": 2, "text": "ü"}, {"n": 3, "text": "half of a pair: \ud83d"}]


def test_rows_come_back_as_they_were_appended(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    append_rows(path, ROWS[:1])
    append_rows(path, ROWS[1:], sync=True)
    assert list(rows_of(path)) == list(enumerate(ROWS, start=1))
    assert [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]] == ROWS
    assert "ü" in path.read_text(encoding="utf-8"), "readable for people"


def test_a_kill_at_any_byte_loses_the_torn_row_alone(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    whole = "".join(map(as_line, ROWS)).encode()
    for num_bytes in range(1, len(whole) + 1):
        path.write_bytes(whole[:num_bytes])
        num_newlines = whole[:num_bytes].count(b"\n")
        is_complete = num_bytes < len(whole) and whole[num_bytes : num_bytes + 1] == b"\n"
        kept = ROWS[: num_newlines + is_complete]
        assert [row for _, row in rows_of(path)] == kept
        assert bool(torn_line(path)) == (not is_complete and whole[num_bytes - 1 : num_bytes] != b"\n")
        end_last_line(path)
        append_rows(path, [{"next": 1}])
        assert [row for _, row in rows_of(path)] == [*kept, {"next": 1}]


def test_a_bad_line_before_the_last_is_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"n": 1}\n{"n": \n{"n": 3}\n')
    with pytest.raises(DataError, match=r"rows\.jsonl, line 2 is not a sample: '\{\"n\": '\. Restore"):
        list(rows_of(path, row_name="a sample"))


def test_no_file_has_no_rows(tmp_path: Path) -> None:
    assert list(rows_of(tmp_path / "rows.jsonl")) == []
    assert torn_line(tmp_path / "rows.jsonl") == b""
