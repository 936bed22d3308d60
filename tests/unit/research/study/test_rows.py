"""results.jsonl: rows are read back as they were written, in a fixed order, and a line that is no row is an error."""

from pathlib import Path

import pytest

from research.study.rows import Row, read_rows, write_rows
from rm_robust.errors import DataError


def row(key: str, seed: int = 0) -> Row:
    return Row(
        key,
        "reward_model",
        "embedded",
        "bt",
        seed,
        61.5,
        {"3/in_domain/accuracy": 0.75},
        {"accuracy": [0.5, 0.75]},
        {"num_steps": 188},
    )


def test_rows_are_read_back_as_they_were_written_and_in_the_order_of_their_cells(tmp_path: Path) -> None:
    path = tmp_path / "study" / "results.jsonl"
    rows = {"b": row("b", seed=1), "a": row("a", seed=0)}
    write_rows(path, rows)
    assert read_rows(path) == rows
    assert list(read_rows(path)) == ["a", "b"]
    before = path.read_bytes()
    write_rows(path, read_rows(path))
    assert path.read_bytes() == before


def test_numbers_keep_six_digits(tmp_path: Path) -> None:
    written = Row("a", "rloo", "embedded", "bt", 0, 1.0, {"x": 1 / 3}, {"y": [2e-7 / 3]}, {})
    write_rows(tmp_path / "results.jsonl", {"a": written})
    read = read_rows(tmp_path / "results.jsonl")["a"]
    assert (read.figures, read.curves) == ({"x": 0.333333}, {"y": [6.66667e-8]})


def test_a_study_without_rows_has_none(tmp_path: Path) -> None:
    assert read_rows(tmp_path / "results.jsonl") == {}


@pytest.mark.parametrize("line", ["{", '{"key": "a"}', "[]"])
def test_a_line_that_is_no_row_is_named(tmp_path: Path, line: str) -> None:
    (tmp_path / "results.jsonl").write_text(line + "\n")
    with pytest.raises(DataError, match="line 1 is no row"):
        read_rows(tmp_path / "results.jsonl")


def test_two_rows_of_one_key_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    write_rows(path, {"a": row("a")})
    path.write_text(path.read_text() * 2)
    with pytest.raises(DataError, match="key a of an earlier line"):
        read_rows(path)
