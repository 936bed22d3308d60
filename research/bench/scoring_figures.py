"""The arithmetic of the scoring bench: pure functions of what was timed."""

import math
from collections.abc import Sequence
from statistics import median


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest value that at least `percent` % of the values do not exceed (nearest rank)."""
    assert values
    assert 0 < percent <= 100
    return sorted(values)[math.ceil(len(values) * percent / 100) - 1]


def ratio_of_rounds(ours: Sequence[float], peer: Sequence[float]) -> float:
    """The median of ours[r] / peer[r]: what changes from round to round on the machine changes both."""
    return median(a / b for a, b in zip(ours, peer, strict=True))


def token_limit(token_counts: Sequence[tuple[int, Sequence[int]]]) -> float:
    """Tokens of single requests over tokens of requests that hold a prompt once; `token_counts`: (prompt, its completions) of every list.

    What one request for all K completions can gain where time is proportional to tokens.
    """
    single = sum(prompt * len(completions) + sum(completions) for prompt, completions in token_counts)
    shared = sum(prompt + sum(completions) for prompt, completions in token_counts)
    return single / shared
