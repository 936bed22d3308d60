"""The figures of an evaluation and their bootstrap intervals. Pure numpy.

A figure is a function of means over rows. Rows of one prompt depend on each other, so a resample takes all rows of a
prompt or none (the pairs cluster bootstrap: Cameron, Gelbach & Miller 2008, section III). Prompts of different strata
(subsets of a benchmark) are resampled separately. Shapes: N rows, Q prompts, B resamples.
"""

import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

NUM_RESAMPLES = 1000
CONFIDENCE = 0.95
_MAX_DRAWN = 10**7
"""The largest number of counts (resamples times prompts) held at a time, however large the data are."""

Array = NDArray[np.float64]
Means = Mapping[str, Mapping[str, Array]]
"""Means over rows as [stratum][column], [B] each; NaN where no row has a value."""
Combine = Callable[[Means], dict[str, Array]]
"""A function that makes the figures that a suite reports, [B] each, from means."""


@dataclass(frozen=True)
class Stratum:
    """Rows whose prompts are resampled together."""

    name: str
    prompt_ids: Sequence[str]
    columns: Mapping[str, Sequence[float]]
    """A value for each row, NaN where the row has none."""


@dataclass(frozen=True)
class Estimate:
    """A figure and its percentile interval, both NaN where no row has a value."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Difference:
    """The difference of a figure between two models on the same prompts, with its percentile interval."""

    value: float
    low: float
    high: float
    p_value: float
    """The two-sided bootstrap p-value: twice the share of resamples on the rarer side of 0."""


def estimates(
    strata: Sequence[Stratum], combine: Combine, *, seed: int, num_resamples: int = NUM_RESAMPLES
) -> dict[str, Estimate]:
    """Return every figure of `combine` with its CONFIDENCE interval.

    The same strata and seed give the same resamples, so the figures of two models may be subtracted.
    """
    resampled = resampled_figures(strata, combine, seed=seed, num_resamples=num_resamples)
    return {name: Estimate(float(figure_B[0]), *_interval(figure_B)) for name, figure_B in resampled.items()}


def differences(
    strata: Sequence[Stratum],
    others: Sequence[Stratum],
    combine: Combine,
    *,
    seed: int,
    num_resamples: int = NUM_RESAMPLES,
) -> dict[str, Difference]:
    """Return the figures of `strata` minus those of `others`, which hold another model's values of the same prompts.

    Both are resampled alike.
    """
    assert [(s.name, list(s.prompt_ids)) for s in strata] == [(s.name, list(s.prompt_ids)) for s in others], (
        "not the same prompts"
    )
    figures, other_figures = (
        resampled_figures(model_strata, combine, seed=seed, num_resamples=num_resamples)
        for model_strata in (strata, others)
    )
    named_differences = {}
    for name in figures:
        difference_B = figures[name] - other_figures[name]
        known = difference_B[1:][~np.isnan(difference_B[1:])]
        num_rarer = min((known <= 0).sum(), (known >= 0).sum())
        named_differences[name] = Difference(
            float(difference_B[0]), *_interval(difference_B), p_value=min(1.0, 2 * (num_rarer + 1) / (len(known) + 1))
        )
    return named_differences


def resampled_figures(
    strata: Sequence[Stratum], combine: Combine, *, seed: int, num_resamples: int
) -> dict[str, Array]:
    """Return [1 + B] values of every figure: first of the data as they are, then of each resample."""
    return combine({stratum.name: _means(stratum, seed=seed, num_resamples=num_resamples) for stratum in strata})


def _interval(figure_B: Array) -> tuple[float, float]:
    """Return the percentile interval of the resamples that have a value, or NaN where the data themselves have none."""
    known = figure_B[1:][~np.isnan(figure_B[1:])]
    if not len(known) or np.isnan(figure_B[0]):
        return math.nan, math.nan
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(known, [tail, 1 - tail])
    return float(low), float(high)


def _means(stratum: Stratum, *, seed: int, num_resamples: int) -> dict[str, Array]:
    """Return [1 + B] means of every column. A stratum's resamples do not depend on which other strata there are."""
    generator = np.random.default_rng([seed, zlib.crc32(stratum.name.encode())])
    _, prompt_N = np.unique(np.asarray(stratum.prompt_ids, dtype=str), return_inverse=True)
    num_prompts = int(prompt_N.max()) + 1
    sums, counts = {}, {}
    for name, values in stratum.columns.items():
        value_N = np.asarray(values, dtype=np.float64)
        known_N = ~np.isnan(value_N)
        # Without any known row bincount returns integers, hence astype.
        sums_Q = np.bincount(prompt_N[known_N], weights=value_N[known_N], minlength=num_prompts)
        sums[name] = sums_Q.astype(np.float64)
        counts[name] = np.bincount(prompt_N[known_N], minlength=num_prompts).astype(np.float64)
    parts: dict[str, list[Array]] = {
        name: [_ratio(sums[name].sum(keepdims=True), counts[name].sum(keepdims=True))] for name in sums
    }
    at_a_time = max(1, _MAX_DRAWN // num_prompts)
    for start in range(0, num_resamples, at_a_time):
        size = min(at_a_time, num_resamples - start)
        drawn_BQ = generator.multinomial(num_prompts, np.full(num_prompts, 1 / num_prompts), size=size).astype(
            np.float64
        )
        for name in sums:
            parts[name].append(_ratio(drawn_BQ @ sums[name], drawn_BQ @ counts[name]))
    return {name: np.concatenate(means) for name, means in parts.items()}


def _ratio(sums_B: Array, counts_B: Array) -> Array:
    return np.divide(sums_B, counts_B, out=np.full_like(sums_B, np.nan), where=counts_B > 0)
