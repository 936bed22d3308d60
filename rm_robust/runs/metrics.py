"""Where a run's numbers go: `metrics.jsonl`, TensorBoard beside it, and one INFO line per step.

`metrics.jsonl` is the record; everything else can be made again from it. One JSON object a line, all stages in one file:

    {"stage": "rloo", "step": 3, "num_steps": 60, "time": 1767225600.123, "rloo/gold_score_mean": 0.1, "time/generate_s": 1.4}
"""

import contextlib
import json
import logging
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

from rm_robust.errors import DataError, RmRobustError, StorageError
from rm_robust.runs.storage.commits import storage_errors, write_text_atomic
from rm_robust.runs.storage.transfer import put_file

logger = logging.getLogger(__name__)
METRICS_NAME = "metrics.jsonl"
MetricsLine = dict[str, str | int | float]
"""One line of `metrics.jsonl`: `stage`, `step` (from 1), `time` (Unix seconds) and "area/name" metrics."""


class MetricsSink(Protocol):
    """One more place that a stage's metrics go to (experiment_trackers.py)."""

    def write(self, step: int, metrics: Mapping[str, int | float]) -> None: ...

    def close(self) -> None: ...


class Closable(Protocol):
    def close(self) -> None: ...


class MetricsWriter:
    """Appends one stage's metrics to `run_dir/metrics.jsonl` and to TensorBoard events in `run_dir/tensorboard/<stage>`.

    `resume_step` is the last step whose checkpoint is committed, 0 for a fresh stage. Lines of this stage beyond it, which a killed
    process wrote after its last checkpoint, are dropped (and counted in the log), and so is a torn last line: the steps that are now
    done again appear once. One writer at a time per run directory. `num_steps` of the whole stage stands in every line. `sinks` get what the file
    gets, and are closed with it. Every method raises StorageError, naming the file, when its storage is full or away.
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
        with storage_errors(self._path):
            run_dir.mkdir(parents=True, exist_ok=True)
            _drop_uncommitted(self._path, stage, resume_step)
            self._file = self._path.open("a", encoding="utf-8")
        with storage_errors(self._tensorboard_dir):
            self._tensorboard = SummaryWriter(str(self._tensorboard_dir), purge_step=resume_step + 1, flush_secs=10)

    def write(self, step: int, metrics: Mapping[str, int | float]) -> None:
        """Append the metrics of one step (from 1). Raises RmRobustError, naming the key, when a value is NaN or infinite."""
        assert step >= max(1, self._resume_step), (
            f"{self._stage}: step {step} was already committed (resumed at {self._resume_step})"
        )
        for key, value in metrics.items():
            _check_metric(self._stage, step, key, value)
        line = {"stage": self._stage, "step": step, **self._num_steps, "time": round(time.time(), 3), **metrics}
        with storage_errors(self._path):
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()
        with storage_errors(self._tensorboard_dir):  # its thread writes later, and the next call raises what it met
            for key, value in metrics.items():
                self._tensorboard.add_scalar(key, value, step)
        for sink in self._sinks:
            sink.write(step, metrics)

    def publish(self) -> None:
        """Before a state is committed: to where a run in an object store has its lines, so that none is missing up to that state. Raises StorageError."""
        with storage_errors(self._tensorboard_dir):
            self._tensorboard.flush()
        self._put()

    def close(self) -> None:
        """Close all of them, whichever fails; nothing can be written afterwards."""
        with contextlib.ExitStack() as closing:
            for sink in self._sinks:
                closing.callback(sink.close)
            closing.callback(self._close, self._tensorboard_dir, self._tensorboard)
            closing.callback(self._close, self._path, self._file)
        try:
            self._put()
        except StorageError as error:  # it may come of another error, which is the one to be raised; a stage that ends well says so by a put of its own
            logger.warning("%s", error)

    @staticmethod
    def _close(path: Path, writer: Closable) -> None:
        with storage_errors(path):  # of a file, the line that did not fit is tried once more
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
    """The lines of one stage, in the order written; empty when the stage logged nothing. A torn last line is left out.

    Raises DataError when any other line is not a JSON object with a stage and a step.
    """
    return [line for line in _parse_lines(run_dir / METRICS_NAME) if line["stage"] == stage]


def log_step(
    logger: logging.Logger,
    stage: str,
    step: int,
    num_steps: int,
    metrics: Mapping[str, int | float],
    keys: Sequence[str],
) -> None:
    """One INFO line: `keys` in their order, every step the same fields; "-" for one that this step did not measure."""
    fields = []
    for key in keys:
        value = f"{metrics[key]:.4g}" if key in metrics else "-"
        fields.append(f"{key.removeprefix(stage + '/')}={value}")
    logger.info("%s step %d/%d %s", stage, step, num_steps, " ".join(fields))


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
    """Rewrite the file without the stage's lines beyond `resume_step` and without a torn last line; leave a clean file alone."""
    if not path.exists():
        return
    lines = _parse_lines(path)
    kept = [line for line in lines if line["stage"] != stage or int(line["step"]) <= resume_step]
    text = "".join(json.dumps(line) + "\n" for line in kept)
    if text.encode() == path.read_bytes():
        return
    if len(kept) < len(lines):
        logger.info("%s: dropped %d lines of stage %s beyond step %d", path, len(lines) - len(kept), stage, resume_step)
    write_text_atomic(path, text)


def _parse_lines(path: Path) -> list[MetricsLine]:
    """All complete lines. Only the last may be torn: every line is flushed before the next is begun."""
    if not path.exists():
        return []
    texts = path.read_text(encoding="utf-8", errors="replace").splitlines()
    lines: list[MetricsLine] = []
    for number, text in enumerate(texts, start=1):
        try:
            line = json.loads(text)
            is_valid = (
                isinstance(line, dict) and isinstance(line.get("stage"), str) and isinstance(line.get("step"), int)
            )
        except json.JSONDecodeError:
            is_valid = False
        if is_valid:
            lines.append(line)
        elif number < len(texts):
            raise DataError(
                f"{path}, line {number} is not a metrics line: {text[:80]!r}. Restore the file or delete that line."
            )
        else:
            logger.warning("%s: the last line is torn (a process was killed while writing it) and is left out", path)
    return lines
