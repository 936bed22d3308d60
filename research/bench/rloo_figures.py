"""The arithmetic of the RLOO bench: pure functions of what was timed."""

from collections.abc import Mapping, Sequence

TIME_PREFIX = "time/"


def seconds_per_step(ends_s: Sequence[float]) -> float:
    """Mean time between the ends of successive steps: everything that a step costs, also what no phase counts."""
    assert len(ends_s) >= 2, "a step lies between two ends"
    return (ends_s[-1] - ends_s[0]) / (len(ends_s) - 1)


def phases_of(metrics: Sequence[Mapping[str, str | int | float]]) -> dict[str, list[float]]:
    """Of the metrics of some steps, one value a step of each time/<phase>_s, by phase; a step that did not measure one is left out of it."""
    phases: dict[str, list[float]] = {}
    for line in metrics:
        for key, value in line.items():
            if key.startswith(TIME_PREFIX):
                phases.setdefault(key.removeprefix(TIME_PREFIX).removesuffix("_s"), []).append(float(value))
    return phases


def ideal_step_s(step_s: float, generate_s: float) -> float:
    """max(generate, train) of a synchronous step, all but generation taken as training: its time if the two ran beside each other at no cost."""
    assert 0 <= generate_s <= step_s
    return max(generate_s, step_s - generate_s)


def relative_difference(a: float, b: float) -> float:
    """Of the larger one: 0 where they are equal."""
    return abs(a - b) / max(a, b)
