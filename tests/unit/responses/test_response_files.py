"""Prompts and existing responses, read from files of several shapes."""

import json
from pathlib import Path
from typing import Any

import pytest

from rm_robust.errors import DataError
from rm_robust.responses.config import ResponsesConfig
from rm_robust.responses.response_files import (
    EXISTING,
    Response,
    chunk_path,
    chunks_of,
    read_material,
    read_responses,
    write_existing,
)


def write(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return str(path)


def config(**settings: Any) -> ResponsesConfig:
    return ResponsesConfig(name="test", **settings)


def test_prompts_come_once_in_the_order_of_their_files(tmp_path: Path) -> None:
    first = write(tmp_path / "a.jsonl", [{"prompt": "One?"}, {"prompt": [{"role": "user", "content": "Two?"}]}])
    second = write(tmp_path / "b.jsonl", [{"prompt": "Two?"}, {"prompt": "Three?", "prompt_id": "third"}])
    material = read_material(config(prompts=[first, second]))
    assert [prompt.messages[0]["content"] for prompt in material.prompts] == ["One?", "Two?", "Three?"]
    assert (material.prompts[2].prompt_id, material.num_repeated) == ("third", 1)
    assert len(read_material(config(prompts=[first, second], num_prompts=2)).prompts) == 2


def test_existing_responses_bring_their_prompts_in_their_own_shape_and_in_ultrafeedbacks(tmp_path: Path) -> None:
    own_shape = write(
        tmp_path / "own.jsonl",
        [
            {"prompt": "One?", "model": "a", "completion": "1\u2028"},
            {"prompt": "One?", "model": "b", "completion": "uno"},
        ],
    )
    completions = [
        {"model": "c", "response": "2", "overall_score": 7.0},
        {"model": "d", "response": "due", "overall_score": 2.0},
    ]
    ultrafeedback = write(
        tmp_path / "uf.jsonl",
        [{"source": "x", "instruction": "Two?", "models": ["c", "d"], "completions": completions}],
    )
    prompts = write(tmp_path / "more.jsonl", [{"prompt": "One?"}, {"prompt": "Three?"}])
    material = read_material(config(existing=[own_shape, ultrafeedback], prompts=[prompts]))
    assert [prompt.messages[0]["content"] for prompt in material.prompts] == ["One?", "Two?", "Three?"]
    chunks = chunks_of(material.prompts, 2)
    write_existing(material, chunks, tmp_path)
    written = [read_responses(chunk_path(tmp_path, EXISTING, number)) for number in range(len(chunks))]
    assert [[(response.model, response.completion) for response in part] for part in written] == [
        [("a", "1\u2028"), ("b", "uno"), ("c", "2"), ("d", "due")],
        [],
    ]
    assert all(
        isinstance(response, Response) and response.prompt_id in {prompt.prompt_id for prompt in chunks[0]}
        for response in written[0]
    )


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        ([{"prompt": "One?", "model": "a"}], "row 1: a response needs the name of its model and its text"),
        ([{"instruction": "One?", "completions": ["text"]}], "row 1: a response needs the name of its model"),
        ([{"completions": []}], "row 1: column 'prompt' is missing"),
        (
            [
                {"prompt": "One?", "prompt_id": "x", "completions": []},
                {"prompt": "Two?", "prompt_id": "x", "completions": []},
            ],
            "row 2: prompt_id 'x' is that of",
        ),
    ],
)
def test_a_row_that_cannot_be_read_is_named(rows: list[Any], reason: str, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", rows)
    with pytest.raises(DataError, match=f"a.jsonl, {reason}"):
        read_material(config(existing=[path]))
