"""Where a run stands: stages, steps, the latest metrics, and the time left of a stage, all from the run's own files.

The files do not say how long the whole run takes. A stage that waits has no measured pace, its number of steps is known
only once it begins, and the pace of an earlier run belongs to other machines. So each stage has its own time left, and
the run has none.
"""

import itertools
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rm_robust.errors import DataError
from rm_robust.runs.directory import RESOLVED_NAME
from rm_robust.runs.layout import STAGES, TWIN_STAGES, RunLayout
from rm_robust.runs.lock import is_written
from rm_robust.runs.metrics import MetricsLine, read_metrics
from rm_robust.runs.storage.copies import shown

RECENT_STEPS = 20
"""Number of latest steps that give the pace. It is the median time between their lines, so that a single evaluation or
restart among them does not count."""
QUIET_S = 600.0
"""Seconds without a step after which a run that has no lock here (a job of a cluster, or of another machine) counts as
stopped."""
SHOWN = {
    "sft": ("sft/loss", "sft/eval_loss"),
    "reward_model": ("reward_model/loss", "reward_model/accuracy", "reward_model/in_domain_accuracy"),
    "rloo": ("rloo/proxy_score_mean", "rloo/gold_score_mean", "rloo/kl_mean"),
}


@dataclass(frozen=True)
class StageStatus:
    """Where one stage stands. Fields about steps are None for a stage without steps."""

    stage: str
    state: str
    """done, begun, stopped or waiting; or "not run": it would come next, and nobody writes the run."""
    seconds: float | None
    """How long the stage took; None while it is not done."""
    step: int | None
    num_steps: int | None
    seconds_since_last_step: float | None
    seconds_left: float | None
    """Time left at the present pace; None where the stage is done or the pace is not known."""
    metrics: dict[str, float]


def status_of(run_dir: Path) -> list[StageStatus]:
    """Return the status of every stage in order, with those of a Bradley-Terry twin as `bt_twin/…`.

    Raises DataError for a folder that is no run.
    """
    if not (run_dir / RESOLVED_NAME).is_file():
        raise DataError(
            f"{shown(run_dir)} is no run: it has no {RESOLVED_NAME}. Name a run directory, or a folder of them."
        )
    config, layout = json.loads((run_dir / RESOLVED_NAME).read_text()), RunLayout(run_dir)
    is_left_out = {"world": config["data"]["source"] != "embedded", "sft": not config["sft"]["enabled"]}
    is_left_out["rloo"] = config["data"]["source"] != "embedded" and not config["data"]["rloo_prompts"]
    stages = [_stage_status(layout, stage.name) for stage in STAGES if not is_left_out.get(stage.name)]
    if config["reward_model"]["bt_twin"]:
        twin = RunLayout(layout.bt_twin)
        at = 1 + [stage.stage for stage in stages].index("evaluation")
        stages[at:at] = [
            replace(_stage_status(twin, stage), stage=f"{twin.run_dir.name}/{stage}") for stage in TWIN_STAGES
        ]
    return stages if _goes_on(run_dir, stages) else [_as_stopped(stage) for stage in stages]


def _goes_on(run_dir: Path, stages: Sequence[StageStatus]) -> bool:
    """Return whether somebody writes the run, by its lock, or else by the age of its last step."""
    written = is_written(run_dir)
    if written is not None:
        return written
    ages_s = [stage.seconds_since_last_step for stage in stages if stage.seconds_since_last_step is not None]
    return not ages_s or min(ages_s) < QUIET_S


def _as_stopped(stage: StageStatus) -> StageStatus:
    state = {"begun": "stopped", "waiting": "not run"}.get(stage.state, stage.state)
    return replace(stage, state=state, seconds_left=None)


def runs_in(folder: Path) -> list[Path]:
    """The folder itself when it is a run, otherwise the runs in it, the one that was written to last first.

    Raises DataError when there are none.
    """
    if (folder / RESOLVED_NAME).is_file():
        return [folder]
    run_dirs = [path.parent for path in folder.glob(f"*/{RESOLVED_NAME}")]
    if not run_dirs:
        raise DataError(f"There is no run in {shown(folder)}.")
    return sorted(run_dirs, key=lambda run_dir: -max(map(_written_at, (run_dir, *run_dir.iterdir()))))


def _written_at(path: Path) -> float:
    """Return the time of the last write; 0 for a file that a run has replaced since it was listed."""
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def status_lines(run_dir: Path, stages: Sequence[StageStatus]) -> list[str]:
    """Return the lines that a terminal shows: the run, and a line for each stage."""
    return [shown(run_dir), *(f"  {stage.stage:20} {stage.state:8} {_details(stage)}".rstrip() for stage in stages)]


def _stage_status(layout: RunLayout, stage: str) -> StageStatus:
    lines = read_metrics(layout.run_dir, stage)
    last = lines[-1] if lines else None
    is_done = layout.is_done(stage)
    step, num_steps = (int(last["step"]), _as_int(last.get("num_steps"))) if last else (None, None)
    left_s = None if step is None or num_steps is None else seconds_left(_times_s(lines), num_steps - step)
    # The preferences stage already makes the folder rloo/, for its prompts.
    begins_with = layout.rloo_samples if stage == "rloo" else layout.run_dir / stage
    return StageStatus(
        stage=stage,
        state="done" if is_done else "begun" if last or begins_with.exists() else "waiting",
        seconds=float(layout.stage_result(stage)["seconds"]) if is_done else None,
        step=step,
        num_steps=num_steps,
        seconds_since_last_step=None if last is None or is_done else max(0.0, time.time() - float(last["time"])),
        seconds_left=None if is_done else left_s,
        metrics={name: _latest(lines, name) for name in SHOWN.get(stage, ()) if any(name in line for line in lines)},
    )


def _times_s(lines: Sequence[MetricsLine]) -> list[float]:
    return [float(line["time"]) for line in lines[-RECENT_STEPS - 1 :]]


def seconds_left(times_s: Sequence[float], num_steps_left: int) -> float | None:
    """Return the seconds that the steps ahead take at the median pace of the latest steps, which ended at these times.

    None with fewer than two times.
    """
    if len(times_s) < 2:
        return None
    pace_s = statistics.median(later - earlier for earlier, later in itertools.pairwise(times_s))
    return pace_s * max(0, num_steps_left)


def _latest(lines: Sequence[MetricsLine], name: str) -> float:
    return float(next(line[name] for line in reversed(lines) if name in line))


def _as_int(value: str | float | None) -> int | None:
    return None if value is None else int(value)


def _details(status: StageStatus) -> str:
    parts = []
    if status.step is not None:
        at = "at " if status.state == "stopped" else ""
        parts.append(f"{at}step {status.step}" + (f" of {status.num_steps}" if status.num_steps else ""))
    if status.seconds is not None:
        parts.append(f"{duration(status.seconds)}")
    if status.seconds_since_last_step is not None:
        parts.append(f"last step {duration(status.seconds_since_last_step)} ago")
    if status.seconds_left is not None:
        parts.append(f"about {duration(status.seconds_left)} left")
    return ", ".join(parts + [f"{name.partition('/')[2]} {value:.4g}" for name, value in status.metrics.items()])


def duration(seconds: float) -> str:
    """Return seconds as people say them: 7 s, 3 min 20 s, 2 h 5 min."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"
