"""Define and read the tokenised parquet between stages. Each row is a prompt with its K completions, as token ids."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.dataset as pads

from rm_robust.data.records import Message, TokenGroup
from rm_robust.errors import DataError

TOKEN_SCHEMA = pa.schema(
    [
        ("group_id", pa.string()),
        ("prompt_json", pa.string()),
        ("prompt_ids", pa.list_(pa.int32())),
        ("completion_ids", pa.list_(pa.list_(pa.int32()))),
        ("gold_scores", pa.list_(pa.float64())),
        ("models", pa.list_(pa.string())),
        ("margin", pa.float64()),
        ("weight", pa.float64()),
        ("columns_json", pa.string()),
    ]
)


@dataclass(frozen=True)
class TokenisedGroup:
    """One kept row of a scenario."""

    group_id: str
    prompt: list[Message]
    """The prompt's messages; empty where the source gives token ids."""
    tokens: TokenGroup
    gold_scores: list[float]
    margin: float | None
    weight: float = 1.0
    """The weight of a training pair in the loss: its source's weight divided by the number of pairs kept of its row."""
    columns: dict[str, Any] = field(default_factory=dict)
    """Every column of an RLOO prompt's row as it was given, for reward functions; empty for other rows. All rows of a
    folder have the same columns, with None where a row lacks one."""


def read_token_groups(folder: Path) -> list[TokenisedGroup]:
    """Read every row below `folder`, sorted by group id so that the order does not depend on the files.

    Raises DataError when there is no row.
    """
    if not folder.is_dir():
        raise DataError(
            f"There are no tokenised rows at {folder}: run the stage that writes them (`rm-robust run` runs all)."
        )
    table = pads.dataset(str(folder), format="parquet").to_table()
    if not table.num_rows:
        raise DataError(f"{folder} holds no row: nothing is left to train or evaluate on.")
    rows = table.to_pylist()
    # Rows that an earlier version wrote have no such column.
    columns = [json.loads(row.get("columns_json") or "{}") for row in rows]
    names = sorted({name for row in columns for name in row})
    groups = [
        TokenisedGroup(
            group_id=row["group_id"],
            prompt=json.loads(row["prompt_json"]),
            tokens=TokenGroup(row["prompt_ids"], row["completion_ids"]),
            gold_scores=row["gold_scores"],
            margin=row["margin"],
            weight=row["weight"],
            columns={name: given.get(name) for name in names},
        )
        for row, given in zip(rows, columns, strict=True)
    ]
    return sorted(groups, key=lambda group: (group.group_id, group.tokens.completion_ids))
