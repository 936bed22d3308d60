"""Check that named responses are read completely or not at all: a lost row would bias the split."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rm_robust.data.preferences import read_named_responses
from rm_robust.data.records import NamedResponse
from rm_robust.errors import DataError

ROW: dict[str, Any] = {"prompt": "Name a colour.", "model": "m1", "completion": "red", "gold_score": 1}


def write(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_jsonl_and_parquet_rows_give_the_same_responses(tmp_path: Path) -> None:
    jsonl = str(tmp_path / "a.jsonl")
    rows = [ROW, {**ROW, "model": "m2", "completion": "line\u2028end"}]
    Path(jsonl).write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "b.parquet")
    responses = read_named_responses([jsonl])
    assert responses == read_named_responses([str(tmp_path / "b.parquet")])
    assert responses[0] == NamedResponse(
        responses[0].prompt_id, [{"role": "user", "content": "Name a colour."}], "m1", "red", 1.0
    )
    assert responses[1].completion == "line\u2028end"


def test_responses_to_one_prompt_share_an_id_whether_it_is_text_or_messages(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "Name a colour."}]
    path = write(
        tmp_path / "a.jsonl", [ROW, {**ROW, "prompt": messages}, {**ROW, "prompt": "Another."}, {**ROW, "prompt_id": 0}]
    )
    ids = [response.prompt_id for response in read_named_responses([path])]
    assert ids[0] == ids[1] != ids[2]
    assert ids[3] == "0"


def test_blank_lines_are_no_rows(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(ROW) + "\n\n  \n")
    assert len(read_named_responses([str(path)])) == 1


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ([1], "must be a JSON object"),
        ({**ROW, "model": None}, r"lacks \['model'\]"),
        ({"prompt": "x"}, r"lacks \['model', 'completion', 'gold_score'\]"),
        ({**ROW, "gold_score": True}, "gold_score is True"),
        ({**ROW, "gold_score": float("nan")}, "gold_score is nan"),
        ({**ROW, "completion": 3}, "has a int as completion"),
        ({**ROW, "prompt": []}, "at least one message"),
        ({**ROW, "completion": "\ud800"}, "completion is not valid Unicode"),
    ],
)
def test_a_row_that_cannot_be_read_stops_the_reading_at_its_file_and_line(
    tmp_path: Path, row: Any, reason: str
) -> None:
    path = write(tmp_path / "a.jsonl", [ROW, row])
    with pytest.raises(DataError, match=f"{path}, line 2.*{reason}"):
        read_named_responses([path])


def test_a_torn_line_a_foreign_encoding_and_an_empty_file_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    for content in (json.dumps(ROW).encode()[:-3], b"\xff" + json.dumps(ROW).encode()):
        path.write_bytes(content)
        with pytest.raises(DataError, match=f"{path}, line 1: not (JSON|UTF-8).*Fix or remove"):
            read_named_responses([str(path)])
    path.write_bytes(b"")
    with pytest.raises(DataError, match="hold no response"):
        read_named_responses([str(path)])
