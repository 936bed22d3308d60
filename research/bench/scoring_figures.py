"""The arithmetic of the scoring bench: pure functions of the measured times."""

import math
from collections.abc import Sequence
from statistics import median


def percentile(values: Sequence[float], percent: float) -> float:
    """Return the smallest value that at least `percent` % of the values do not exceed (nearest rank)."""
    assert values
    assert 0 < percent <= 100
    return sorted(values)[math.ceil(len(values) * percent / 100) - 1]


def ratio_of_rounds(ours: Sequence[float], peer: Sequence[float]) -> float:
    """Return the median of ours[r] / peer[r]. What changes on the machine from round to round changes both sides."""
    return median(a / b for a, b in zip(ours, peer, strict=True))


def token_limit(token_counts: Sequence[tuple[int, Sequence[int]]]) -> float:
    """Return the tokens of single requests over the tokens of requests that hold a prompt once.

    `token_counts` has (prompt, its completions) for every list. The result is the most that one request for all K
    completions can gain if time is proportional to tokens.
    """
    single = sum(prompt * len(completions) + sum(completions) for prompt, completions in token_counts)
    shared = sum(prompt + sum(completions) for prompt, completions in token_counts)
    return single / shared
