"""Reads named models' responses with gold scores: jsonl or parquet rows with prompt, model, completion, gold_score."""

import hashlib
import json
from collections.abc import Iterator
from typing import Any

from rm_robust.chat import as_messages, check_text
from rm_robust.data_files import DataFile, list_files, read_lines, read_parquet_rows
from rm_robust.errors import DataError
from rm_robust.records import NamedResponse
from rm_robust.rows import finite_number


def read_named_responses(paths: list[str]) -> list[NamedResponse]:
    """Every row of every file. Raises DataError naming file and row for the first one that cannot be read: a lost response would bias the split."""
    responses = [_parse(row, where) for path in paths for file in list_files(path) for where, row in _rows(file)]
    if not responses:
        raise DataError(f"{', '.join(paths)} hold no response: there is nothing to build scenarios from.")
    return responses


def _rows(file: DataFile) -> Iterator[tuple[str, Any]]:
    if file.suffix == ".parquet":
        for number, row in enumerate(read_parquet_rows(file), 1):
            yield f"{file.path}, row {number}", row
        return
    for number, line in enumerate(read_lines(file), 1):
        where = f"{file.path}, line {number}"
        if not line.strip():
            continue
        try:
            yield where, json.loads(line)
        except ValueError as error:
            raise DataError(f"{where} is not JSON: {error}. Mend or remove the line.") from error


def _parse(row: Any, where: str) -> NamedResponse:
    if not isinstance(row, dict):
        raise DataError(f"{where} must be an object, got {row!r}.")
    missing = [name for name in ("prompt", "model", "completion", "gold_score") if row.get(name) is None]
    if missing:
        raise DataError(f"{where} lacks {missing} (columns: {sorted(row)}).")
    if not isinstance(row["completion"], str):
        raise DataError(f"{where} has a {type(row['completion']).__name__} as completion; it must be text.")
    try:
        prompt, gold_score = as_messages(row["prompt"]), finite_number(row["gold_score"], "gold_score")
        check_text(row["completion"], "completion")
    except DataError as error:
        raise DataError(f"{where}: {error}") from error
    prompt_id = row.get("prompt_id")
    if prompt_id is None:
        prompt_id = hashlib.sha256(json.dumps(prompt, sort_keys=True).encode()).hexdigest()[:16]
    return NamedResponse(str(prompt_id), prompt, str(row["model"]), row["completion"], gold_score)
