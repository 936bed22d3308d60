"""The study's record: one line of JSON a run in results.jsonl. Tables and figures are made from it alone."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from rm_robust.errors import DataError
from rm_robust.study.grid import Cell, Part
from rm_robust.tracking import write_text_atomic

SIGNIFICANT_DIGITS = 6


@dataclass(frozen=True)
class Row:
    """What one run measured."""

    key: str
    part: Part
    world: str
    variant: str
    seed: int
    seconds: float
    """Of the run's own stages, not of those it shares with its twins."""
    figures: Mapping[str, float]
    """A reward model: <epoch>/<scenario or "train">/<metric>, epochs from 1. RLOO: <metric>."""
    curves: Mapping[str, list[float]]
    """Over training; a reward model: means of equal parts of it. RLOO: one value a step."""
    about: Mapping[str, str | int | float]
    """What the run was made with: counts of the data, versions."""

    @property
    def cell(self) -> Cell:
        return Cell(self.part, self.world, self.variant, self.seed)


def read_rows(path: Path) -> dict[str, Row]:
    """By key. Raises DataError for a line that is no row, and for two of one key."""
    rows: dict[str, Row] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines() if path.exists() else [], start=1):
        try:
            row = Row(**json.loads(line))
        except (ValueError, TypeError) as error:
            raise DataError(
                f"{path}, line {number} is no row of the study ({error}). Restore the file, or delete that line: its run is then done again."
            ) from error
        if row.key in rows:
            raise DataError(f"{path}, line {number} has the key {row.key} of an earlier line. Delete one of them.")
        rows[row.key] = row
    return rows


def write_rows(path: Path, rows: Mapping[str, Row]) -> None:
    """In a fixed order, so that a row that is added changes one line."""
    ordered = sorted(rows.values(), key=lambda row: (row.part, row.world, row.variant, row.seed, row.key))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text_atomic(path, "".join(json.dumps(_rounded(asdict(row)), allow_nan=False) + "\n" for row in ordered))


def _rounded(value: object) -> object:
    if isinstance(value, float):
        return float(f"{value:.{SIGNIFICANT_DIGITS}g}")
    if isinstance(value, Mapping):
        return {key: _rounded(own) for key, own in value.items()}
    return [_rounded(own) for own in value] if isinstance(value, list) else value
