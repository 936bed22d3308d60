"""Prompts, and the files of responses to them.

There is one file for each model and chunk of prompts; it is complete or does not exist.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rm_robust.data.chat import as_messages, check_text
from rm_robust.data.files import list_files
from rm_robust.data.records import Message
from rm_robust.data.row_texts import read_rows
from rm_robust.data.rows import parse_prompt
from rm_robust.errors import DataError
from rm_robust.responses.config import ResponsesConfig
from rm_robust.runs import files as run_files

EXISTING = "_existing"
"""The folder of the existing responses, in place of a model's name; no model may have this name."""


@dataclass(frozen=True)
class Prompt:
    """A prompt that all models respond to."""

    prompt_id: str
    messages: list[Message]


@dataclass(frozen=True)
class Response:
    """One model's response to a prompt."""

    prompt_id: str
    prompt: list[Message]
    model: str
    completion: str | None
    """The text; None where the prompt does not leave max_new_tokens in the engine's context."""
    num_tokens: int
    """Tokens of the completion, or of the prompt where there is no completion; 0 where nobody counted."""
    is_truncated: bool
    """Whether the completion was cut off instead of ending by itself."""


@dataclass(frozen=True)
class Material:
    """The prompts, and the responses that exist already."""

    prompts: list[Prompt]
    existing: dict[str, list[Response]]
    """The existing responses by prompt id."""
    num_repeated: int
    """How often a prompt came again in the files of prompts."""


def read_material(config: ResponsesConfig) -> Material:
    """Read the prompts and the existing responses.

    Raises DataError that names the file and row of the first row that cannot be read, and of a prompt that has the id
    of another prompt.
    """
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
        raise DataError(f"There is no prompt in {', '.join(config.prompts + config.existing)}.")
    return Material(list(prompts.values()), existing, num_repeated)


def write_existing(material: Material, chunks: Sequence[Sequence[Prompt]], folder: Path) -> None:
    """Write the existing responses into files as if a model had generated them."""
    for number, chunk in enumerate(chunks):
        path = chunk_path(folder, EXISTING, number)
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            run_files.write_text(
                path, lines_of([response for prompt in chunk for response in material.existing[prompt.prompt_id]])
            )


def chunks_of(prompts: Sequence[Prompt], size: int) -> list[list[Prompt]]:
    """Return the prompts in chunks of `size`; the last one may be smaller."""
    return [list(prompts[start : start + size]) for start in range(0, len(prompts), size)]


def chunk_path(folder: Path, model: str, chunk: int) -> Path:
    """Return the path of the file of a model's responses to a chunk of prompts."""
    return folder / "responses" / model / f"chunk_{chunk:05}.jsonl"


def read_responses(path: Path) -> list[Response]:
    """Return the responses of one file."""
    return [Response(**json.loads(line)) for line in path.read_text(encoding="utf-8").split("\n") if line]


def lines_of(responses: Sequence[Response]) -> str:
    """Return the content of a file of responses, one JSON line for each."""
    return "".join(json.dumps(asdict(response), ensure_ascii=False) + "\n" for response in responses)


def _rows(paths: Sequence[str]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for file in (file for path in paths for file in list_files(path)):
        for number, row in read_rows(file):
            yield f"{file.path}, row {number}", row


def _responses_of(row: Mapping[str, Any], prompt_id: str, prompt: list[Message]) -> Iterator[Response]:
    """Yield the responses of a row, which has one response, or several in the form of UltraFeedback."""
    completions = (
        [{"model": row.get("model"), "response": row.get("completion")}]
        if row.get("completions") is None
        else row["completions"]
    )
    for entry in completions if isinstance(completions, list) else [completions]:
        model, completion = (entry.get("model"), entry.get("response")) if isinstance(entry, dict) else (None, entry)
        if not isinstance(model, str) or not isinstance(completion, str):
            raise DataError(
                f"a response needs the name of its model and its text, got model {model!r} and response "
                f"{completion!r:.80} (columns: {sorted(row)})"
            )
        check_text(completion, "completion")
        yield Response(prompt_id, as_messages(prompt), model, completion, num_tokens=0, is_truncated=False)
