"""The suites by name: how each suite reads a row, and what it reports."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from rm_robust.evaluation import constant_answers, preferences, reward_bench, rm_bench
from rm_robust.evaluation.bootstrap import Combine, Stratum
from rm_robust.evaluation.cases import CASE_COLUMNS, Case, CaseFacts

Scores = Sequence[Sequence[float]]


@dataclass(frozen=True)
class Suite:
    """The rules of one benchmark."""

    parse: Callable[[Mapping[str, Any]], Case]
    strata: Callable[[Sequence[CaseFacts], Scores], list[Stratum]]
    combine: Combine
    notes: Callable[[Sequence[CaseFacts]], list[str]] = lambda _: []
    """Returns the notes that a reader of the figures must know."""
    details: Callable[[Sequence[CaseFacts], Scores], dict[str, Any]] = lambda _cases, _scores: {}
    """Returns what the pictures show besides the figures; the result holds it under its own names."""
    columns: frozenset[str] = CASE_COLUMNS
    """The columns that are read of a parquet file."""
    without_interval: frozenset[str] = frozenset()
    """The figures, by the part of their name after the last dot, that get neither an interval nor a comparison."""


def preferences_by(column: str | None) -> Suite:
    """Return the suite of pairs or rankings whose subset `column` names.

    With None, the first usual column that a row has names the subset.
    """
    return Suite(
        partial(preferences.parse, by=column),
        preferences.strata,
        preferences.combine,
        details=preferences.reliability,
        columns=CASE_COLUMNS | {column} if column else CASE_COLUMNS,
        without_interval=preferences.BIASED_BY_RESAMPLING,
    )


SUITES: dict[str, Suite] = {
    "preferences": preferences_by(None),
    "constant_answers": Suite(
        constant_answers.parse, constant_answers.strata, constant_answers.combine, details=constant_answers.answers
    ),
    "rm_bench": Suite(rm_bench.parse, rm_bench.strata, rm_bench.combine, rm_bench.notes, rm_bench.style_matrix),
    "reward_bench": Suite(reward_bench.parse_1, reward_bench.strata_1, reward_bench.combine_1, reward_bench.notes_1),
    "reward_bench_2": Suite(reward_bench.parse_2, reward_bench.strata_2, reward_bench.combine_2, reward_bench.notes_2),
}
