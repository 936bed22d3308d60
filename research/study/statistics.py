"""Means over seeds with their intervals, and differences between twins: pure functions of the study's rows.

Twins start from the same weights and see the same batches, so their difference is taken seed by seed. Its interval is
Student's t over seeds.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import t

from research.study.rows import Row

CONFIDENCE = 0.95
Figure = Callable[[Row], float | None]
"""A function that returns one number of a row, or None if the row does not have it."""


@dataclass(frozen=True)
class Interval:
    """A mean over seeds and its interval. Both ends are NaN with fewer than two seeds."""

    mean: float
    low: float
    high: float
    num_seeds: int

    @property
    def sign(self) -> int:
        """1 if the whole interval is above 0, -1 if it is below 0, and otherwise 0."""
        return 1 if self.low > 0 else -1 if self.high < 0 else 0


def t_interval(values: Sequence[float]) -> Interval:
    """Return the mean of `values` with Student's t interval. Raises ValueError if there are no values."""
    if not values:
        raise ValueError("An interval needs at least one value, got none.")
    mean = float(np.mean(values))
    if len(values) < 2:
        return Interval(mean, math.nan, math.nan, len(values))
    half = float(t.ppf((1 + CONFIDENCE) / 2, len(values) - 1) * np.std(values, ddof=1) / math.sqrt(len(values)))
    return Interval(mean, mean - half, mean + half, len(values))


def over_seeds(rows: Iterable[Row], world: str, variant: str, figure: Figure) -> Interval | None:
    """Return the mean of the figure over seeds with its interval, or None if no row has the figure."""
    values = by_seed(rows, world, variant, figure)
    return t_interval(list(values.values())) if values else None


def between_twins(rows: Iterable[Row], world: str, variant: str, other: str, figure: Figure) -> Interval | None:
    """Return the mean of `variant` minus `other` over the seeds that both have, or None if they share no seed."""
    rows = list(rows)
    values, others = (by_seed(rows, world, name, figure) for name in (variant, other))
    differences = [values[seed] - others[seed] for seed in sorted(values.keys() & others.keys())]
    return t_interval(differences) if differences else None


def by_seed(rows: Iterable[Row], world: str, variant: str, figure: Figure) -> dict[int, float]:
    values = {row.seed: figure(row) for row in rows if (row.world, row.variant) == (world, variant)}
    return {seed: value for seed, value in values.items() if value is not None}
