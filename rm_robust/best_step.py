"""Which evaluation of a run was the best, and whether to stop early: a pure function of the metrics logged so far, so that a resumed run agrees."""

from dataclasses import dataclass, field
from pathlib import Path

import torch.distributed as dist

from rm_robust.tracking import read_metrics


@dataclass
class BestStep:
    """The evaluations of one metric (higher is better)."""

    metric: str
    patience: int | None
    """Stop after so many evaluations without a new best; None: never."""
    values: dict[int, float] = field(default_factory=dict)
    """Number of steps done -> value."""

    def record(self, num_steps_done: int, metrics: dict[str, float]) -> bool:
        """Take the metric if it was evaluated here; True when it is the best so far (an equal later one is not)."""
        if self.metric not in metrics:
            return False
        self.values[num_steps_done] = metrics[self.metric]
        return self.step == num_steps_done

    @property
    def step(self) -> int | None:
        """Steps done at the best evaluation; None before the first."""
        return max(self.values, key=lambda step: (self.values[step], -step), default=None)

    @property
    def is_over(self) -> bool:
        return self.patience is not None and self.step is not None and sum(step > self.step for step in self.values) >= self.patience

    def resume(self, run_dir: Path, stage: str, first_step: int) -> None:
        """Take up the evaluations of the first `first_step` steps. Every rank calls it: rank 0 reads."""
        found: list[dict[int, float]] = [{}]
        if not dist.is_initialized() or dist.get_rank() == 0:
            lines = read_metrics(run_dir, stage)
            found[0] = {int(line["step"]): float(line[self.metric]) for line in lines if self.metric in line and int(line["step"]) <= first_step}
        if dist.is_initialized():
            dist.broadcast_object_list(found)
        self.values = found[0]
