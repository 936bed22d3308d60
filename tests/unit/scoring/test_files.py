"""The command that scores a file works against a real HTTP server."""

import json
from pathlib import Path
from typing import Any

import pytest

from pipelines.command import main
from rm_robust.scoring import files as score_files
from tests.unit.scoring.test_client import CHECKPOINT_A, CHECKPOINT_B, Answer, refused, right_scores, scored, serving

NUM_LINES = 30


@pytest.fixture(autouse=True)
def _small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(score_files, "INPUTS_AT_A_TIME", 4)


def write_data(folder: Path) -> Path:
    data = folder / "data.jsonl"
    rows = [{"id": n, "prompt": f"p{n}", "completions": [str(n), str(-n)]} for n in range(1, NUM_LINES + 1)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return data


def right(_: int, inputs: list[dict[str, Any]]) -> Answer:
    return scored(right_scores(inputs))


def written(out: Path) -> list[tuple[int, list[float], str]]:
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    return [(row["line"], row["scores"], row["checkpoint"]) for row in rows]


ALL_RIGHT = [(n, [float(n), float(-n)], CHECKPOINT_A) for n in range(1, NUM_LINES + 1)]


def test_every_line_gets_its_scores_in_order(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_data(tmp_path)
    with serving(right) as server:
        assert main(["score", "--url", server.url, str(data)]) == 0
    assert written(tmp_path / "data.scores.jsonl") == ALL_RIGHT
    assert f"{NUM_LINES} lines" in capsys.readouterr().out


def test_a_command_that_failed_or_was_killed_within_a_line_continues_and_scores_no_line_twice(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = write_data(tmp_path), tmp_path / "out.jsonl"
    asked: list[str] = []

    def fails_at_the_third_request(number: int, inputs: list[dict[str, Any]]) -> Answer:
        asked.extend(item["prompt"] for item in inputs)
        return refused(422, "no") if number == 2 else right(number, inputs)

    with serving(fails_at_the_third_request) as server:
        assert main(["score", "--url", server.url, str(data), "--out", str(out)]) == 1
        assert "goes on from there" in capsys.readouterr().err
        assert len(written(out)) == 8
        with out.open("a") as file:
            file.write('{"line": 9, "sco')  # torn
        assert main(["score", "--url", server.url, str(data), "--out", str(out)]) == 0
        assert main(["score", "--url", server.url, str(data), "--out", str(out)]) == 0
    assert written(out) == ALL_RIGHT
    assert len(asked) == NUM_LINES + 4  # the four that were refused were asked again, and no others


def test_scores_of_two_checkpoints_do_not_get_into_one_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, out = write_data(tmp_path), tmp_path / "out.jsonl"

    def swapped(number: int, inputs: list[dict[str, Any]]) -> Answer:
        return scored(right_scores(inputs), checkpoint=CHECKPOINT_A if number < 2 else CHECKPOINT_B)

    with serving(swapped) as server:
        assert main(["score", "--url", server.url, str(data), "--out", str(out)]) == 1
    assert f"holds scores of {CHECKPOINT_A}, the server now has {CHECKPOINT_B}" in capsys.readouterr().err
    assert written(out) == ALL_RIGHT[:8]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("not json", "line 2 is not an input"),
        ("[1]", "line 2 is not an input: it is not a JSON object. Correct"),
        ('{"prompt": "p"}', "line 2 is not an input: completions"),
        ('{"prompt": "p", "completions": []}', "line 2 is not an input: completions"),
    ],
)
def test_a_wrong_line_is_named_and_nothing_is_skipped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], line: str, problem: str
) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text('{"prompt": "p", "completions": ["1"]}\n' + line + "\n")
    with serving(right) as server:
        assert main(["score", "--url", server.url, str(data)]) == 1
    assert problem in capsys.readouterr().err
    assert (tmp_path / "data.scores.jsonl").read_text() == ""


def test_a_foreign_or_longer_output_file_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, out = write_data(tmp_path), tmp_path / "out.jsonl"
    with serving(right) as server:
        out.write_text('{"something": "else"}\n')
        assert main(["score", "--url", server.url, str(data), "--out", str(out)]) == 1
        assert "line 1 was not written by this command" in capsys.readouterr().err
        rows = [
            json.dumps({"line": n, "scores": [0.0], "model": "m", "checkpoint": CHECKPOINT_A}) + "\n"
            for n in range(1, NUM_LINES + 2)
        ]
        out.write_text("".join(rows))
        assert main(["score", "--url", server.url, str(data), "--out", str(out)]) == 1
        assert f"has {NUM_LINES + 1} lines" in capsys.readouterr().err
        assert server.num_requests == 0


def test_a_missing_file_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["score", "--url", "http://127.0.0.1:1", str(tmp_path / "no.jsonl")]) == 1
    assert f"{tmp_path}/no.jsonl: No such file" in capsys.readouterr().err


@pytest.mark.parametrize("foreign", ["one line of somebody else's", '{"prompt": "p", "completions": ["a"]}'])
def test_a_file_without_a_newline_that_this_command_did_not_write_is_left_as_it_is(
    tmp_path: Path, foreign: str, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = write_data(tmp_path), tmp_path / "out.jsonl"
    out.write_text(foreign)
    with serving(right) as server:
        assert main(["score", "--url", server.url, str(data), "--out", str(out)]) == 1
    assert out.read_text() == foreign
    assert "was not written by this command" in capsys.readouterr().err
