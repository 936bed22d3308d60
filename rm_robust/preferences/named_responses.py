"""Reads named models' responses with gold scores: jsonl or parquet rows with prompt, model, completion, gold_score."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from rm_robust.chat import as_messages, check_text
from rm_robust.data_files import list_files, read_rows
from rm_robust.errors import DataError
from rm_robust.records import NamedResponse
from rm_robust.rows import finite_number


def read_named_responses(paths: list[str]) -> list[NamedResponse]:
    """Every row of every file. Raises DataError naming file and row for the first one that cannot be read: a lost response would bias the split."""
    responses = [
        _parse(row, f"{file.path}, {'row' if file.suffix == '.parquet' else 'line'} {number}")
        for path in paths
        for file in list_files(path)
        for number, row in read_rows(file)
    ]
    if not responses:
        raise DataError(f"{', '.join(paths)} hold no response: there is nothing to build scenarios from.")
    return responses


def _parse(row: Mapping[str, Any], where: str) -> NamedResponse:
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
