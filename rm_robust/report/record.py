"""Everything that the report shows, read back from a run directory.

A part that has not run is None or empty.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from rm_robust.data.scenarios import SCENARIOS
from rm_robust.errors import DataError
from rm_robust.runs.directory import RESOLVED_NAME
from rm_robust.runs.layout import STAGES_WITH_STEPS, TWIN_STAGES, RunLayout
from rm_robust.runs.lines import rows_of
from rm_robust.runs.metrics import MetricsLine, read_metrics
from rm_robust.training.reward_model.metrics import ScenarioResult

FloatArray = NDArray[np.float64]


@dataclass(frozen=True)
class ScenarioScores:
    """One scenario of `evaluation/scores.parquet`: one entry per completion, NaN where nothing was recorded."""

    scores: FloatArray
    norms_before: FloatArray
    norms_after: FloatArray


@dataclass(frozen=True)
class SourceRows:
    """The counts of one data source, as the report.json of its tokens has them (data/pipeline.py)."""

    scenario: str
    paths: list[str]
    num_read: int
    num_kept: int
    num_truncated: int
    num_merged: int
    num_dropped: dict[str, int]
    num_skipped_files: dict[str, int]
    skipped_files: list[str]
    lost_fraction: float


@dataclass(frozen=True)
class ResponseModels:
    """Mean gold score of every response model of the embedded world, by name."""

    training: dict[str, float]
    unseen: dict[str, float]


@dataclass(frozen=True)
class Sample:
    """One sampled completion of an RLOO step, as text.

    A score is None where scoring failed; the gold score is also None where the judge was not asked.
    """

    step: int
    prompt: str
    completion: str
    proxy_score: float | None
    gold_score: float | None
    num_tokens: int


@dataclass(frozen=True)
class RunRecord:
    """What one run directory holds."""

    name: str
    config: dict[str, object]
    """The settings by their dotted names, such as "rloo.learning_rate"."""
    sources: list[SourceRows]
    """The data sources of the stages that have run."""
    metrics: dict[str, list[MetricsLine]]
    evaluation: dict[str, ScenarioResult]
    scores: dict[str, ScenarioScores]
    response_models: ResponseModels | None
    samples: list[Sample]
    stage_seconds: dict[str, float]
    bt_twin: "RunRecord | None"
    """The run of the reward model's Bradley-Terry twin, where one was trained."""

    @property
    def all_stage_seconds(self) -> dict[str, float]:
        """Seconds per committed stage. The twin's own stages come before RLOO."""
        twin = self.bt_twin.stage_seconds if self.bt_twin else {}
        twin_stages = {f"{stage}, BT twin": twin[stage] for stage in TWIN_STAGES if stage in twin}
        before = {stage: seconds for stage, seconds in self.stage_seconds.items() if stage != "rloo"}
        return before | twin_stages | self.stage_seconds


@dataclass(frozen=True)
class Series:
    """One metric over training: the steps that logged it and its values, both [n]."""

    steps: FloatArray
    values: FloatArray


@dataclass(frozen=True)
class JudgedStep:
    """What the over-optimisation monitor said of the window that ends at `step`.

    The rises are in standard deviations of the first step's scores.
    """

    step: int
    proxy_rise: float
    gold_rise: float
    is_overoptimised: bool


def read_run(run_dir: Path) -> RunRecord:
    """Read everything that the run directory holds.

    Raises DataError for a run directory that does not exist or a file that cannot be understood.
    """
    if not run_dir.is_dir():
        raise DataError(
            f"There is no run directory at {run_dir}. Give the directory of a run (it holds config.resolved.json)."
        )
    layout = RunLayout(run_dir)
    return RunRecord(
        name=run_dir.resolve().name,
        config=_flatten(_read_json(run_dir / RESOLVED_NAME) or {}),
        sources=[
            source
            for folder in (layout.sft_tokens, layout.preference_tokens, layout.rloo_prompts)
            for source in _read_sources(folder / "report.json")
        ],
        metrics={stage: read_metrics(run_dir, stage) for stage in STAGES_WITH_STEPS},
        evaluation=_read_evaluation(layout.evaluation_table),
        scores=_read_scores(layout.evaluation_scores),
        response_models=_read_response_models(layout.response_models),
        samples=_read_samples(layout.rloo_samples),
        stage_seconds=_read_stage_seconds(layout.stage_records),
        bt_twin=read_run(layout.bt_twin) if layout.bt_twin.is_dir() else None,
    )


def metric_series(lines: list[MetricsLine], key: str) -> Series:
    """Return the values of `key` against step; empty when no line has it."""
    points = [(float(line["step"]), float(line[key])) for line in lines if key in line]
    array = np.array(points, dtype=np.float64).reshape(len(points), 2)
    return Series(array[:, 0], array[:, 1])


def first_and_last_tenth(values: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Return the first and the last tenth of the steps, at least one step each: [n] -> two of [max(1, n // 10)]."""
    num_steps = max(1, len(values) // 10)
    return values[:num_steps], values[-num_steps:]


def gold_gain(lines: list[MetricsLine]) -> float | None:
    """Return the gain in mean gold score from the first to the last tenth of the steps.

    The unit is the standard deviation of the first tenth's completions. It is pooled over the tenth's steps, which all
    have the same size: sqrt(mean of the steps' variances + variance of their means). The gain is None when the gold
    score or its deviation was not logged, or the deviation is 0.
    """
    means = metric_series(lines, "rloo/gold_score_mean").values
    stds = metric_series(lines, "rloo/gold_score_std").values
    if len(means) == 0 or len(means) != len(stds):
        return None
    first_means, last_means = first_and_last_tenth(means)
    first_stds, _ = first_and_last_tenth(stds)
    pooled_std = float(np.sqrt(np.mean(first_stds**2) + np.var(first_means)))
    return float(last_means.mean() - first_means.mean()) / pooled_std if pooled_std > 0 else None


def judged_steps(lines: list[MetricsLine]) -> list[JudgedStep]:
    """Return the steps that the monitor judged, as it logged them; empty when its window was never full."""
    keys = ("step", "rloo/monitor/proxy_rise", "rloo/monitor/gold_rise")
    judged = [
        ([float(line[key]) for key in keys], line["rloo/overoptimised"])
        for line in lines
        if "rloo/overoptimised" in line
    ]
    return [
        JudgedStep(int(step), proxy_rise, gold_rise, verdict == 1) for (step, proxy_rise, gold_rise), verdict in judged
    ]


def policy_evaluations(lines: list[MetricsLine]) -> list[dict[str, int | float]]:
    """Return the evaluations of the policy in the order of their steps.

    Each has its "step", and every logged metric rloo/eval/<name> under <name>.
    """
    evaluations: dict[int, dict[str, int | float]] = {}
    for line in lines:
        if "rloo/eval/gold_mean" in line:
            values = {
                key.removeprefix("rloo/eval/"): float(value)
                for key, value in line.items()
                if key.startswith("rloo/eval/")
            }
            evaluations[int(line["step"])] = {"step": int(line["step"]), **values}
    return [evaluations[step] for step in sorted(evaluations)]


def _read_json(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path} is not JSON ({error}). The same command writes it again.") from error
    if not isinstance(content, dict):
        raise DataError(f"{path} should hold one JSON object, got {type(content).__name__}.")
    return content


def _malformed(path: Path, error: Exception) -> DataError:
    return DataError(
        f"{path} does not have the expected fields ({error!r}). Do the stage that writes it again: "
        "`rm-robust run --again STAGE`."
    )


def _flatten(config: dict[str, Any], prefix: str = "") -> dict[str, object]:
    flat: dict[str, object] = {}
    for key, value in config.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _read_sources(path: Path) -> list[SourceRows]:
    try:
        return [
            SourceRows(**{field: row[field] for field in SourceRows.__annotations__})
            for row in (_read_json(path) or {"sources": []})["sources"]
            if "lost_fraction" in row  # the reports of earlier versions have other counts
        ]
    except (KeyError, TypeError) as error:
        raise _malformed(path, error) from error


def _read_evaluation(path: Path) -> dict[str, ScenarioResult]:
    content = _read_json(path) or {}
    try:
        return {
            name: ScenarioResult(**{field: row[field] for field in ScenarioResult.__annotations__})
            for name, row in content.items()
        }
    except (KeyError, TypeError) as error:
        raise _malformed(path, error) from error


def _read_scores(path: Path) -> dict[str, ScenarioScores]:
    if not path.is_file():
        return {}
    columns = ["scenario", "score", "hidden_norm_before_final_norm", "hidden_norm_after_final_norm"]
    try:
        table = pq.read_table(path, columns=columns)
        missing = set(columns) - set(table.column_names)
    except (OSError, ValueError) as error:
        raise _malformed(path, error) from error
    if missing:
        raise _malformed(path, KeyError(*sorted(missing)))
    scenarios = np.array(table.column("scenario").to_pylist(), dtype=object)
    arrays = [np.array(table.column(name).to_pylist(), dtype=np.float64) for name in columns[1:]]
    return {
        name: ScenarioScores(*(array[scenarios == name] for array in arrays))
        for name in SCENARIOS
        if (scenarios == name).any()
    }


def _read_response_models(path: Path) -> ResponseModels | None:
    content = _read_json(path)
    if content is None:
        return None
    try:
        return ResponseModels(
            **{field: {str(k): float(v) for k, v in content[field].items()} for field in ("training", "unseen")}
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _malformed(path, error) from error


def _read_samples(path: Path) -> list[Sample]:
    """Return the samples, without the last one where a killed process left it torn."""
    samples = []
    for _, row in rows_of(path, row_name="a sample"):
        try:
            samples.append(Sample(**{field: row[field] for field in Sample.__annotations__}))
        except (KeyError, TypeError) as error:
            raise _malformed(path, error) from error
    return samples


def _read_stage_seconds(folder: Path) -> dict[str, float]:
    """Return the seconds per committed stage, in the order in which the stages finished."""
    stages: list[tuple[float, str, float]] = []
    for path in sorted(folder.glob("*.json")):
        content = _read_json(path) or {}
        try:
            stages.append((float(content["finished_at"]), str(content["stage"]), float(content["seconds"])))
        except (KeyError, TypeError, ValueError) as error:
            raise _malformed(path, error) from error
    return {stage: seconds for _, stage, seconds in sorted(stages)}
