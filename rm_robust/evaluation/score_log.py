"""The log of an evaluation's scores, written as they come, so that a stopped evaluation can go on.

The first line says what is evaluated; then there is one line for each case:

{"evaluation": {"suite": …, "files": [sha256, …], "checkpoint": …, …}}
{"case": 0, "scores": [float, …]}      or {"case": 0, "refused": "why"}
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rm_robust.errors import DataError
from rm_robust.runs.lines import append_rows, as_line, end_last_line, rows_of

Outcome = list[float] | str
"""The scores of a case, or the reason why it has none."""


class ScoreLog:
    """The log of one evaluation. `outcomes` are those of the first cases, one for each whole line of the file."""

    def __init__(self, path: Path, identity: dict[str, Any]) -> None:
        """Open or create the log. Raises DataError, naming what differs, when the file is of another evaluation."""
        self._path = path
        if not path.exists() or b"\n" not in path.read_bytes():
            path.write_text(as_line({"evaluation": identity}))
        logged_identity, self.outcomes = read_log(path)
        require_same(path, logged_identity, identity)
        end_last_line(path)

    def append(self, outcomes: Sequence[Outcome]) -> None:
        first_case = len(self.outcomes)
        rows = [
            {"case": case} | ({"refused": outcome} if isinstance(outcome, str) else {"scores": outcome})
            for case, outcome in enumerate(outcomes, start=first_case)
        ]
        append_rows(self._path, rows, sync=True)
        self.outcomes += outcomes


def read_log(path: Path) -> tuple[dict[str, Any], list[Outcome]]:
    """Return what was evaluated, and the outcomes of the first cases.

    Raises DataError when there is no such file, and when it is not a file that one ScoreLog wrote.
    """
    if not path.exists():
        raise DataError(f"There is no {path}: an evaluation writes it into its --out folder.")
    try:
        head, *records = (row for _, row in rows_of(path))
        identity, numbers = head["evaluation"], [record["case"] for record in records]
        outcomes = [record["refused"] if "refused" in record else record["scores"] for record in records]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path} is no log of scores ({type(error).__name__}: {error}). Delete it and evaluate again."
        ) from error
    if numbers != list(range(len(numbers))):
        raise DataError(
            f"{path} has its cases out of order: two evaluations wrote it at once. Delete it and evaluate again."
        )
    return identity, outcomes


def require_same(path: Path, logged_identity: Mapping[str, Any], identity: Mapping[str, Any]) -> None:
    """Raise DataError, naming what differs, when the log is of another evaluation."""
    differing = [
        f"{key} was {logged_identity.get(key)!r}, is {value!r}"
        for key, value in identity.items()
        if logged_identity.get(key) != value
    ]
    if differing:
        raise DataError(
            f"{path} holds the scores of another evaluation: {'; '.join(differing)}. "
            "Name another folder, or delete this one."
        )
