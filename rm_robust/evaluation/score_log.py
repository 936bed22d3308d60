"""The scores of an evaluation as they come, so that a stopped one goes on: a line of what is evaluated, then one a case.

{"evaluation": {"suite": …, "files": [sha256, …], "checkpoint": …, …}}
{"case": 0, "scores": [float, …]}      or {"case": 0, "refused": "why"}
"""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rm_robust.errors import DataError

Outcome = list[float] | str
"""A case's scores, or why there are none."""


class ScoreLog:
    """`outcomes` are those of the first cases; whole lines only are kept of a killed process."""

    def __init__(self, path: Path, identity: dict[str, Any]) -> None:
        """Raises DataError when the file holds scores of something else, naming what differs."""
        self._path = path
        if not path.exists() or b"\n" not in path.read_bytes():
            path.write_text(json.dumps({"evaluation": identity}) + "\n")
        found, self.outcomes = read_log(path)
        require_same(path, found, identity)
        os.truncate(path, path.read_bytes().rindex(b"\n") + 1)

    def append(self, outcomes: Sequence[Outcome]) -> None:
        start = len(self.outcomes)
        lines = [
            json.dumps(
                {"case": start + index} | ({"refused": outcome} if isinstance(outcome, str) else {"scores": outcome})
            )
            + "\n"
            for index, outcome in enumerate(outcomes)
        ]
        with self._path.open("a") as file:
            file.write("".join(lines))
            file.flush()
            os.fsync(file.fileno())
        self.outcomes += outcomes


def read_log(path: Path) -> tuple[dict[str, Any], list[Outcome]]:
    """What was evaluated, and the outcomes of the first cases. Raises DataError when there is no such file, or it is none that ScoreLog writes alone."""
    if not path.exists():
        raise DataError(f"There is no {path}: an evaluation writes it into its --out folder.")
    try:
        head, *records = (
            json.loads(line) for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")
        )
        identity, numbers = head["evaluation"], [record["case"] for record in records]
        outcomes = [record["refused"] if "refused" in record else record["scores"] for record in records]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path} is no log of scores ({type(error).__name__}: {error}). Delete it, and evaluate again."
        ) from error
    if numbers != list(range(len(numbers))):
        raise DataError(
            f"{path} has its cases out of order: two evaluations wrote it at once. Delete it, and evaluate again."
        )
    return identity, outcomes


def require_same(path: Path, found: Mapping[str, Any], identity: Mapping[str, Any]) -> None:
    """Raises DataError naming what differs."""
    differing = [
        f"{key} was {found.get(key)!r}, is {value!r}" for key, value in identity.items() if found.get(key) != value
    ]
    if differing:
        raise DataError(
            f"{path} holds the scores of another evaluation: {'; '.join(differing)}. Name another folder, or delete this one."
        )
