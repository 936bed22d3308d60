"""Tokenised parquet between stages: one row a prompt with its K completions, as token ids."""

import json
from dataclasses import dataclass
from pathlib import Path

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
    ]
)


@dataclass(frozen=True)
class TokenisedGroup:
    """A kept row of a scenario."""

    group_id: str
    prompt: list[Message]
    """Empty where the source gave token ids."""
    tokens: TokenGroup
    gold_scores: list[float]
    margin: float | None
    weight: float = 1.0
    """What a training pair counts in the loss: its source's weight over the number of pairs that its row gave."""


def read_token_groups(folder: Path) -> list[TokenisedGroup]:
    """Every row below `folder`, ordered by group id so that order does not depend on how files were written. Raises DataError when there is none."""
    if not folder.is_dir():
        raise DataError(
            f"There are no tokenised rows at {folder}: run the stage that writes them (pipelines/full_rlhf.py runs all)."
        )
    table = pads.dataset(str(folder), format="parquet").to_table()
    if not table.num_rows:
        raise DataError(f"{folder} holds no row: nothing is left to train or evaluate on.")
    groups = [
        TokenisedGroup(
            group_id=row["group_id"],
            prompt=json.loads(row["prompt_json"]),
            tokens=TokenGroup(row["prompt_ids"], row["completion_ids"]),
            gold_scores=row["gold_scores"],
            margin=row["margin"],
            weight=row["weight"],
        )
        for row in table.to_pylist()
    ]
    return sorted(groups, key=lambda group: (group.group_id, group.tokens.completion_ids))
