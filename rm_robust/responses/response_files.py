"""Prompts, and the files of responses to them: a file a model and chunk of prompts, whole or not there."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rm_robust.data.chat import as_messages, check_text
from rm_robust.data.files import list_files, read_rows
from rm_robust.data.records import Message
from rm_robust.data.rows import parse_prompt
from rm_robust.errors import DataError
from rm_robust.responses.config import ResponsesConfig
from rm_robust.runs.storage.commits import write_text_atomic

EXISTING = "_existing"
"""Stands for a model's name in the folder of responses that were there already; no model may be called that."""


@dataclass(frozen=True)
class Prompt:
    """What all models answer."""

    prompt_id: str
    messages: list[Message]


@dataclass(frozen=True)
class Response:
    """One model's answer. `completion` None: the prompt does not leave max_new_tokens in the engine's context."""

    prompt_id: str
    prompt: list[Message]
    model: str
    completion: str | None
    num_tokens: int
    """Of the completion, or of the prompt where there is none; 0 where nobody counted."""
    is_truncated: bool
    """It did not end by itself."""


@dataclass(frozen=True)
class Material:
    """What there is to respond to, and what is responded already: responses by prompt id."""

    prompts: list[Prompt]
    existing: dict[str, list[Response]]
    num_repeated: int
    """Prompts that came again."""


def read_material(config: ResponsesConfig) -> Material:
    """Raises DataError naming file and row of the first that cannot be read, and when two prompts have one id."""
    prompts: dict[str, Prompt] = {}
    existing: dict[str, list[Response]] = {}
    text_of_id: dict[str, str] = {}
    num_repeated = 0
    for paths, is_existing in ((config.existing, True), (config.prompts, False)):
        for where, row in _rows(paths):
            try:
                group = parse_prompt({"prompt": row.get("instruction"), **row})
                responses = list(_responses_of(row, group.group_id, group.prompt)) if is_existing else []
            except DataError as error:
                raise DataError(f"{where}: {error}") from error
            text = json.dumps(group.prompt)
            if text_of_id.setdefault(group.group_id, text) != text:
                raise DataError(f"{where}: prompt_id {group.group_id!r} is that of another prompt. Give each its own.")
            if text not in prompts and len(prompts) == config.num_prompts:
                continue
            num_repeated += text in prompts and not is_existing
            prompt = prompts.setdefault(text, Prompt(group.group_id, group.prompt))
            existing.setdefault(prompt.prompt_id, []).extend(responses)
    if not prompts:
        raise DataError(f"{', '.join(config.prompts + config.existing)} hold no prompt.")
    return Material(list(prompts.values()), existing, num_repeated)


def write_existing(material: Material, chunks: Sequence[Sequence[Prompt]], folder: Path) -> None:
    """As if a model had generated them."""
    for number, chunk in enumerate(chunks):
        path = chunk_path(folder, EXISTING, number)
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text_atomic(
                path, lines_of([response for prompt in chunk for response in material.existing[prompt.prompt_id]])
            )


def chunks_of(prompts: Sequence[Prompt], size: int) -> list[list[Prompt]]:
    return [list(prompts[start : start + size]) for start in range(0, len(prompts), size)]


def chunk_path(folder: Path, model: str, chunk: int) -> Path:
    return folder / "responses" / model / f"chunk_{chunk:05}.jsonl"


def read_responses(path: Path) -> list[Response]:
    return [Response(**json.loads(line)) for line in path.read_text(encoding="utf-8").split("\n") if line]


def lines_of(responses: Sequence[Response]) -> str:
    return "".join(json.dumps(asdict(response), ensure_ascii=False) + "\n" for response in responses)


def _rows(paths: Sequence[str]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for file in (file for path in paths for file in list_files(path)):
        for number, row in read_rows(file):
            yield f"{file.path}, row {number}", row


def _responses_of(row: Mapping[str, Any], prompt_id: str, prompt: list[Message]) -> Iterator[Response]:
    """Of a row of one response, or of UltraFeedback's several."""
    completions = (
        [{"model": row.get("model"), "response": row.get("completion")}]
        if row.get("completions") is None
        else row["completions"]
    )
    for entry in completions if isinstance(completions, list) else [completions]:
        model, completion = (entry.get("model"), entry.get("response")) if isinstance(entry, dict) else (None, entry)
        if not isinstance(model, str) or not isinstance(completion, str):
            raise DataError(
                f"a response needs the names of its model and its text, got model {model!r} and response {completion!r:.80} (columns: {sorted(row)})"
            )
        check_text(completion, "completion")
        yield Response(prompt_id, as_messages(prompt), model, completion, num_tokens=0, is_truncated=False)
