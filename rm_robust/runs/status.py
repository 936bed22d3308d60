"""Where a run stands, from its own files alone: stages, steps, the latest metrics, and how long the rest of a stage takes at its present pace.

How long the whole run takes nobody can say from them: a stage that waits has no measured pace, its number of steps is known once it begins (a run that stops
early has fewer), and an earlier run's pace is of other machines. So each stage has its own time left, and the run has none.
"""

import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rm_robust.errors import DataError
from rm_robust.runs.directory import RESOLVED_NAME
from rm_robust.runs.layout import STAGES, RunLayout
from rm_robust.runs.metrics import MetricsLine, read_metrics
from rm_robust.runs.storage.copies import shown

RECENT_STEPS = 20
"""What the pace is taken of: the median time between their lines, so that an evaluation or a restart among them does not count."""
SHOWN = {
    "sft": ("sft/loss", "sft/eval_loss"),
    "reward_model": ("reward_model/loss", "reward_model/accuracy", "reward_model/in_domain_accuracy"),
    "rloo": ("rloo/proxy_score_mean", "rloo/gold_score_mean", "rloo/kl_mean"),
}
TWIN_STAGES = ("reward_model", "evaluation")
"""What the Bradley-Terry twin does itself, between the run's own evaluation and RLOO."""


@dataclass(frozen=True)
class StageStatus:
    """One stage. Steps are of the stages that have some."""

    stage: str
    state: str
    """done, begun or waiting. Whether a begun one still runs nobody knows from files: see `seconds_since_last_step`."""
    seconds: float | None
    """Of a done stage."""
    step: int | None
    num_steps: int | None
    seconds_since_last_step: float | None
    seconds_left: float | None
    """At the present pace; None where it is done or not known."""
    metrics: dict[str, float]


def status_of(run_dir: Path) -> list[StageStatus]:
    """Every stage in order, those of a Bradley-Terry twin as `bt_twin/…`. Raises DataError for a folder that is no run."""
    if not (run_dir / RESOLVED_NAME).is_file():
        raise DataError(
            f"{shown(run_dir)} is no run: it has no {RESOLVED_NAME}. Name a run directory, or a folder of them."
        )
    config, layout = json.loads((run_dir / RESOLVED_NAME).read_text()), RunLayout(run_dir)
    left_out = {"world": config["data"]["source"] != "embedded", "sft": not config["sft"]["enabled"]}
    stages = [_stage_status(layout, stage) for stage in STAGES if not left_out.get(stage)]
    if config["reward_model"]["bt_twin"]:
        twin = RunLayout(layout.bt_twin)
        stages[-1:-1] = [
            replace(_stage_status(twin, stage), stage=f"{twin.run_dir.name}/{stage}") for stage in TWIN_STAGES
        ]
    return stages


def runs_in(folder: Path) -> list[Path]:
    """The folder itself when it is a run, otherwise the runs in it, the one that was written to last first. Raises DataError when there are none."""
    if (folder / RESOLVED_NAME).is_file():
        return [folder]
    found = [path.parent for path in folder.glob(f"*/{RESOLVED_NAME}")]
    if not found:
        raise DataError(f"There is no run in {shown(folder)}.")
    return sorted(found, key=lambda run_dir: -max(map(_written_at, (run_dir, *run_dir.iterdir()))))


def _written_at(path: Path) -> float:
    """0 for a file that is gone since it was listed: a run replaces its own."""
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def status_lines(run_dir: Path, stages: Sequence[StageStatus]) -> list[str]:
    """For a terminal."""
    return [shown(run_dir), *(f"  {own.stage:20} {own.state:8} {_told(own)}".rstrip() for own in stages)]


def _stage_status(layout: RunLayout, stage: str) -> StageStatus:
    lines = read_metrics(layout.run_dir, stage)
    last = lines[-1] if lines else None
    is_done = layout.is_done(stage)
    step, num_steps = (int(last["step"]), _whole(last.get("num_steps"))) if last else (None, None)
    pace_s = seconds_a_step(lines)
    begins_with = (
        layout.rloo_samples if stage == "rloo" else layout.run_dir / stage
    )  # rloo/ has its prompts long before
    return StageStatus(
        stage=stage,
        state="done" if is_done else "begun" if last or begins_with.exists() else "waiting",
        seconds=float(layout.stage_result(stage)["seconds"]) if is_done else None,
        step=step,
        num_steps=num_steps,
        seconds_since_last_step=None if last is None or is_done else max(0.0, time.time() - float(last["time"])),
        seconds_left=None if is_done or None in (step, num_steps, pace_s) else pace_s * max(0, num_steps - step),  # type: ignore[operator]
        metrics={name: _latest(lines, name) for name in SHOWN.get(stage, ()) if any(name in line for line in lines)},
    )


def seconds_a_step(lines: Sequence[MetricsLine]) -> float | None:
    """The median of the latest steps; None with fewer than two."""
    times = [float(line["time"]) for line in lines[-RECENT_STEPS - 1 :]]
    return (
        statistics.median(later - earlier for earlier, later in zip(times, times[1:], strict=False))
        if len(times) > 1
        else None
    )


def _latest(lines: Sequence[MetricsLine], name: str) -> float:
    return float(next(line[name] for line in reversed(lines) if name in line))


def _whole(value: str | float | None) -> int | None:
    return None if value is None else int(value)


def _told(own: StageStatus) -> str:
    parts = []
    if own.step is not None:
        parts.append(f"step {own.step}" + (f" of {own.num_steps}" if own.num_steps else ""))
    if own.seconds is not None:
        parts.append(f"{_duration(own.seconds)}")
    if own.seconds_since_last_step is not None:
        parts.append(f"last step {_duration(own.seconds_since_last_step)} ago")
    if own.seconds_left is not None:
        parts.append(f"about {_duration(own.seconds_left)} left")
    return ", ".join(parts + [f"{name.partition('/')[2]} {value:.4g}" for name, value in own.metrics.items()])


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"
