"""The line of the stage that works, as a person sees it: step, time left, the figures that matter."""

from collections import deque
from dataclasses import dataclass, field

from rm_robust.runs.metrics import LoggedStep
from rm_robust.runs.status import RECENT_STEPS, SHOWN, duration, seconds_left


@dataclass
class StageView:
    """The line of the stage that now works."""

    name: str
    label: str
    begun_at_s: float
    printed_at_s: float
    """When the line was begun and when it was last printed, on this process's monotonic clock."""
    step: LoggedStep | None = None
    times_s: deque[float] = field(default_factory=lambda: deque(maxlen=RECENT_STEPS + 1))
    """When the latest steps were logged, by the clock of the process that did so: Ray forwards lines in batches."""
    figures: dict[str, str] = field(default_factory=dict)
    """The latest value of each figure that a person wants to see."""

    def take(self, step: LoggedStep, logged_at_s: float) -> None:
        """Take a step that was logged at this time, in seconds."""
        self.step = step
        self.times_s.append(logged_at_s)
        names = [name.partition("/")[2] for name in SHOWN.get(self.name, ())]
        self.figures |= {name: step.fields[name] for name in names if name in step.fields}

    def text(self, now_s: float) -> str:
        """Return the line without its label."""
        if self.step is None:
            return duration(now_s - self.begun_at_s)
        parts = [f"step {self.step.step} of {self.step.num_steps}"]
        left_s = seconds_left(self.times_s, self.step.num_steps - self.step.step)
        if left_s is not None:
            parts.append(f"about {duration(left_s)} left")
        return ", ".join([*parts, *self.shown_figures()])

    def shown_figures(self) -> list[str]:
        """Return each figure with its name."""
        return [f"{name} {value}" for name, value in self.figures.items()]
