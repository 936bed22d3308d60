"""The cases of an evaluation, each a prompt with some completions, and how the rows of files become cases.

Texts are read when they are needed, a few at a time, and are not kept: only what the figures are made of stays in
memory (KnownCase).
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from typing import Any, Protocol

from rm_robust.data.chat import as_messages, check_text
from rm_robust.data.files import DataFile, find_files, list_files, open_file
from rm_robust.data.records import Message
from rm_robust.data.row_texts import read_rows
from rm_robust.data.rows import COLUMNS
from rm_robust.errors import DataError
from rm_robust.evaluation.bootstrap import Stratum
from rm_robust.scoring.contract import ScoreInput

CASE_COLUMNS = COLUMNS | {"subset", "source", "domain"}
"""The columns that the suites read."""


class CaseFacts(Protocol):
    """What a suite's rules need to know about a prompt and its K >= 2 completions."""

    @property
    def prompt_id(self) -> str:
        """An id that is equal for equal prompts."""

    @property
    def num_characters(self) -> Sequence[int]:
        """The length of each completion in characters."""

    @property
    def gold_scores(self) -> Sequence[float]:
        """A gold score for each completion, the higher the better; a pair has 1 for chosen and 0 for rejected."""

    @property
    def subset(self) -> str:
        """The part of the suite, as the suite's rules name it."""

    @property
    def is_pair(self) -> bool:
        """Whether the case is chosen against rejected, not a ranking (not even one of two)."""

    @property
    def own_id(self) -> str:
        """The row's `id`."""

    @property
    def place(self) -> str:
        """The file's name and the row's number in it, counted from 1."""


@dataclass(frozen=True, slots=True)
class KnownCase:
    """A case without its texts; the fields are those of CaseFacts."""

    prompt_id: str
    fingerprint: bytes
    """A hash of the prompt and all completions."""
    num_characters: tuple[int, ...]
    gold_scores: tuple[float, ...]
    subset: str
    is_pair: bool
    own_id: str
    place: str


@dataclass(frozen=True)
class Case:
    """A case as it is scored, with its texts; it has all of CaseFacts."""

    prompt: list[Message]
    completions: list[str]
    gold_scores: list[float]
    subset: str
    is_pair: bool = False
    own_id: str = ""
    place: str = ""

    @property
    def prompt_id(self) -> str:
        return hashlib.sha256(json.dumps(self.prompt).encode()).hexdigest()[:16]

    @property
    def num_characters(self) -> list[int]:
        return [len(completion) for completion in self.completions]

    @property
    def score_input(self) -> ScoreInput:
        return ScoreInput(prompt=self.prompt, completions=self.completions)

    @property
    def without_texts(self) -> KnownCase:
        texts = json.dumps([self.prompt, self.completions]).encode()
        fingerprint = hashlib.blake2b(texts, digest_size=8).digest()
        return KnownCase(
            self.prompt_id,
            fingerprint,
            tuple(self.num_characters),
            tuple(self.gold_scores),
            self.subset,
            self.is_pair,
            self.own_id,
            self.place,
        )


@dataclass(frozen=True)
class HashedFile:
    """A file that was evaluated, and which content it had."""

    path: str
    num_bytes: int
    sha256: str


def read_cases(
    paths: list[str], parse: Callable[[Mapping[str, Any]], Case], columns: frozenset[str] = CASE_COLUMNS
) -> Iterator[Case]:
    """Yield the cases of all rows of all files, in order. Of a parquet file only `columns` are read.

    Raises DataError that names the file and row of the first row that cannot be read. No row is skipped, because a
    benchmark without some of its rows is another benchmark.
    """
    for file in _files(paths):
        for number, row in read_rows(file, columns):
            yield _case(row, parse, f"{PurePosixPath(file.path).name}:{number}")


def hashed_files(paths: list[str]) -> list[HashedFile]:
    """Return all files with their sizes and hashes, in order."""
    return [HashedFile(file.path, file.num_bytes, _sha256(file)) for file in _files(paths)]


def skipped_files(paths: list[str]) -> list[str]:
    """Return the files in the paths' folders that are not evaluated, each with the reason."""
    return [f"{file.path}: {file.reason}" for path in paths for file in find_files(path).skipped]


def _files(paths: list[str]) -> list[DataFile]:
    return [file for path in paths for file in list_files(path)]


def _case(row: Mapping[str, Any], parse: Callable[[Mapping[str, Any]], Case], place: str) -> Case:
    try:
        case = parse(row)
        for index, completion in enumerate(case.completions):
            check_text(completion, f"Completion {index}")
    except DataError as error:
        raise DataError(f"Row {place}: {error}") from error
    return replace(case, place=place, own_id=str(row.get("id", "")))


def strata_by_subset(cases: Sequence[CaseFacts], rows: Sequence[Mapping[str, float]]) -> list[Stratum]:
    """Return a stratum for each subset. `rows` hold the values that each case has, by column."""
    indices_of: dict[str, list[int]] = {}
    for index, case in enumerate(cases):
        indices_of.setdefault(case.subset, []).append(index)
    return [
        stratum(name, [cases[index] for index in indices], [rows[index] for index in indices])
        for name, indices in sorted(indices_of.items())
    ]


def stratum(name: str, cases: Sequence[CaseFacts], rows: Sequence[Mapping[str, float]]) -> Stratum:
    """Return one stratum of all cases, with a column for every key that some row has, in order of appearance."""
    keys = dict.fromkeys(key for row in rows for key in row)
    return Stratum(
        name, [case.prompt_id for case in cases], {key: [row.get(key, math.nan) for row in rows] for key in keys}
    )


def text_of(row: Mapping[str, Any], column: str) -> str:
    """Return the text in a column of a row. Raises DataError for a column that is missing or not text."""
    value = row.get(column)
    if not isinstance(value, str):
        raise DataError(f"column {column} must be text, got {value!r:.100}; the columns are {', '.join(sorted(row))}")
    return value


def texts_of(row: Mapping[str, Any], column: str) -> list[str]:
    """Return the texts in a column of a row; a single text becomes a list of one.

    Raises DataError for anything else, and for an empty list.
    """
    value = row.get(column)
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
        raise DataError(
            f"column {column} must be a list of texts, got {value!r:.100}; the columns are {', '.join(sorted(row))}"
        )
    return texts


def messages_of(row: Mapping[str, Any]) -> list[Message]:
    """Return the prompt of a row as messages."""
    return as_messages(row.get("prompt"))


def _sha256(file: DataFile) -> str:
    with open_file(file.root, file.path) as opened:
        return "sha256:" + hashlib.file_digest(opened, "sha256").hexdigest()
