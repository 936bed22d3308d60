"""The arithmetic of the RLOO bench: pure functions of the measured times."""

from collections.abc import Mapping, Sequence

TIME_PREFIX = "time/"


def seconds_per_step(ends_s: Sequence[float]) -> float:
    """Return the mean time between the ends of successive steps. It includes what no phase counts."""
    assert len(ends_s) >= 2, "a step lies between two ends"
    return (ends_s[-1] - ends_s[0]) / (len(ends_s) - 1)


def phases_of(metrics: Sequence[Mapping[str, str | int | float]]) -> dict[str, list[float]]:
    """Return the values of each time/<phase>_s metric, by phase, in the order of the steps.

    A step that did not measure a phase has no value there.
    """
    phases: dict[str, list[float]] = {}
    for line in metrics:
        for key, value in line.items():
            if key.startswith(TIME_PREFIX):
                phases.setdefault(key.removeprefix(TIME_PREFIX).removesuffix("_s"), []).append(float(value))
    return phases


def ideal_step_s(step_s: float, generate_s: float) -> float:
    """Return max(generate, train) of a synchronous step, where everything except generation counts as training.

    This is the time of a step if both ran at the same time without extra cost.
    """
    assert 0 <= generate_s <= step_s
    return max(generate_s, step_s - generate_s)


def relative_difference(a: float, b: float) -> float:
    """Return the difference as a fraction of the larger value. It is 0 if both are equal."""
    return abs(a - b) / max(a, b)
