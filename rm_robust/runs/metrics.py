"""Where a run's numbers go: `metrics.jsonl`, TensorBoard beside it, and one INFO line per step.

`metrics.jsonl` is the record, from which everything else can be made again. It has one JSON object a line, and all
stages share the file:

    {"stage": "rloo", "step": 3, "num_steps": 60, "time": 1767225600.123, "rloo/gold_score_mean": 0.1}
"""

import contextlib
import json
import logging
import math
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

from rm_robust.errors import RmRobustError, StorageError
from rm_robust.runs.lines import as_line, bad_line, rows_of
from rm_robust.runs.storage.commits import storage_errors, write_text_atomic
from rm_robust.runs.storage.transfer import put_file

logger = logging.getLogger(__name__)
METRICS_NAME = "metrics.jsonl"
STAGE_LOGGER = "rm_robust.stage"
"""The logger of what happens to a whole stage, which a terminal shows."""
_LOGGED_STEP = re.compile(r"\w+ step (?P<step>\d+)/(?P<num_steps>\d+) (?P<fields>.*)")
MetricsLine = dict[str, str | int | float]
"""One line of `metrics.jsonl`: `stage`, `step` (from 1), `time` (Unix seconds) and "area/name" metrics."""


class MetricsSink(Protocol):
    """One more place that a stage's metrics go to (trackers.py)."""

    def write(self, step: int, metrics: Mapping[str, int | float]) -> None: ...

    def close(self) -> None: ...


class Closable(Protocol):
    def close(self) -> None: ...


class MetricsWriter:
    """Append one stage's metrics to `run_dir/metrics.jsonl` and to TensorBoard events in `run_dir/tensorboard/<stage>`.

    `resume_step` is the last step whose checkpoint is committed, 0 for a fresh stage. A killed process may have written
    lines of later steps, or a torn last line. They are dropped, and counted in the log, so that steps that are done
    again appear once. Every line has the stage's `num_steps`. `sinks` get what the file gets, and are closed with it. A
    run directory has one writer at a time. Every method raises StorageError, naming the file, when its storage is full
    or away.
    """

    def __init__(
        self,
        run_dir: Path,
        stage: str,
        resume_step: int,
        *,
        num_steps: int | None = None,
        sinks: Sequence[MetricsSink] = (),
    ) -> None:
        assert resume_step >= 0, f"resume_step is the number of committed steps, got {resume_step}"
        from torch.utils.tensorboard import SummaryWriter  # slow to import, and the report only reads metrics

        self._stage = stage
        self._num_steps = {} if num_steps is None else {"num_steps": num_steps}
        self._sinks = sinks
        self._resume_step = resume_step
        self._path, self._tensorboard_dir = run_dir / METRICS_NAME, run_dir / "tensorboard" / stage
        if resume_step:
            of = "" if num_steps is None else f" of {num_steps}"
            log_stage(stage, f"goes on from step {resume_step}{of}")
        with storage_errors(self._path):
            run_dir.mkdir(parents=True, exist_ok=True)
            _drop_uncommitted(self._path, stage, resume_step)
            self._file = self._path.open("a", encoding="utf-8")
        with storage_errors(self._tensorboard_dir):
            self._tensorboard = SummaryWriter(str(self._tensorboard_dir), purge_step=resume_step + 1, flush_secs=10)

    def write(self, step: int, metrics: Mapping[str, int | float]) -> None:
        """Append the metrics of one step (from 1).

        Raises RmRobustError, naming the key, when a value is NaN or infinite.
        """
        assert step >= max(1, self._resume_step), (
            f"{self._stage}: step {step} was already committed (resumed at {self._resume_step})"
        )
        for key, value in metrics.items():
            _check_metric(self._stage, step, key, value)
        line = {"stage": self._stage, "step": step, **self._num_steps, "time": round(time.time(), 3), **metrics}
        with storage_errors(self._path):
            self._file.write(as_line(line))
            self._file.flush()
        with storage_errors(self._tensorboard_dir):  # a thread writes later; the next call raises its error
            for key, value in metrics.items():
                self._tensorboard.add_scalar(key, value, step)
        for sink in self._sinks:
            sink.write(step, metrics)

    def persist(self) -> None:
        """Bring all lines to where every node can read them. Raises StorageError.

        Called before a state is committed, so that no line up to that state can be missing.
        """
        with storage_errors(self._tensorboard_dir):
            self._tensorboard.flush()
        self._put()

    def close(self) -> None:
        """Close the file, TensorBoard and all sinks, even when one of them fails. Nothing can be written afterwards."""
        with contextlib.ExitStack() as closing:
            for sink in self._sinks:
                closing.callback(sink.close)
            closing.callback(self._close, self._tensorboard_dir, self._tensorboard)
            closing.callback(self._close, self._path, self._file)
        try:
            self._put()
        except StorageError as error:
            # Another error may be on its way out, which must not be hidden. A stage that ends well persists its lines.
            logger.warning("%s", error)

    @staticmethod
    def _close(path: Path, writer: Closable) -> None:
        with storage_errors(path):  # closing a file writes a line that did not fit once more
            writer.close()

    def _put(self) -> None:
        for path in (self._path, *self._tensorboard_dir.glob("*")):
            put_file(path)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def read_metrics(run_dir: Path, stage: str) -> list[MetricsLine]:
    """Return the lines of one stage, in the order written; none when the stage logged nothing.

    A torn last line is left out. Raises DataError when any other line is not a JSON object with a stage and a step.
    """
    return [line for line in _parse_lines(run_dir / METRICS_NAME) if line["stage"] == stage]


def log_stage(name: str, event: str) -> None:
    """Log what happens to a stage: that it begins, where it goes on, its result, or why there is nothing to do."""
    logging.getLogger(STAGE_LOGGER).info("stage %s: %s", name, event)


def planned_steps(run_dir: Path, stage: str, *, first_step: int, num_steps: int) -> int:
    """Return the number of steps over which a stage plans its learning rate: what it had when its first step was done.

    A stage that got more steps later keeps the warm-up that it had. `first_step` is the number of steps done.
    """
    lines = read_metrics(run_dir, stage) if first_step else []
    return int(lines[0].get("num_steps", num_steps)) if lines else num_steps


def log_step(
    logger: logging.Logger,
    stage: str,
    step: int,
    num_steps: int,
    metrics: Mapping[str, int | float],
    keys: Sequence[str],
) -> None:
    """Log one INFO line with the same fields at every step:

    `keys` in their order, "-" for one that was not measured.
    """
    fields = []
    for key in keys:
        value = f"{metrics[key]:.4g}" if key in metrics else "-"
        fields.append(f"{key.removeprefix(stage + '/')}={value}")
    logger.info("%s step %d/%d %s", stage, step, num_steps, " ".join(fields))


@dataclass(frozen=True)
class LoggedStep:
    """What a line of log_step says."""

    step: int
    num_steps: int
    fields: dict[str, str]
    """Values as they were logged, without those that were not measured."""


def parse_logged_step(message: str) -> LoggedStep | None:
    """Parse a message of log_step; None for any other message."""
    match = _LOGGED_STEP.fullmatch(message)
    if match is None:
        return None
    fields = [field.partition("=") for field in match["fields"].split()]
    if not all(name and value for name, _, value in fields):
        return None
    values = {name: value for name, _, value in fields if value != "-"}
    return LoggedStep(int(match["step"]), int(match["num_steps"]), values)


def _check_metric(stage: str, step: int, key: str, value: int | float) -> None:
    parts = key.split("/")
    is_metric_key = 2 <= len(parts) <= 3 and all(parts)
    assert is_metric_key, f'metric keys are "area/name" or "area/part/name", got {key!r}'
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    assert is_number, f"{key} must be an int or a float, got {type(value).__name__}"
    if not math.isfinite(value):
        raise RmRobustError(
            f"{stage} step {step}: metric {key!r} is {value}. Training has diverged or a score is not finite: "
            "resume from the last checkpoint with a lower learning rate, or look for the batch that causes it."
        )


def _drop_uncommitted(path: Path, stage: str, resume_step: int) -> None:
    """Drop the stage's lines beyond `resume_step`, and a torn last line. A clean file is not written again."""
    if not path.exists():
        return
    lines = _parse_lines(path)
    kept = [line for line in lines if line["stage"] != stage or int(line["step"]) <= resume_step]
    text = "".join(map(as_line, kept))
    if text.encode() == path.read_bytes():
        return
    if len(kept) < len(lines):
        logger.info("%s: dropped %d lines of stage %s beyond step %d", path, len(lines) - len(kept), stage, resume_step)
    write_text_atomic(path, text)


def _parse_lines(path: Path) -> list[MetricsLine]:
    """Return all whole lines. Raises DataError when one is not a JSON object with a stage and a step."""
    lines: list[MetricsLine] = []
    for number, line in rows_of(path, row_name="a metrics line"):
        if not (isinstance(line, dict) and isinstance(line.get("stage"), str) and isinstance(line.get("step"), int)):
            raise bad_line(path, number, "a metrics line", json.dumps(line))
        lines.append(line)
    return lines
