"""The study's record: results.jsonl has one JSON line for each run, made from the finished run's own files.

Tables and figures are made from this record alone. Nothing here trains, and nothing here reads other runs.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from research.study.grid import Cell, Part
from rm_robust.data.scenarios import SCENARIOS
from rm_robust.errors import DataError
from rm_robust.report.record import metric_series
from rm_robust.runs import files as run_files
from rm_robust.runs.layout import RunLayout
from rm_robust.runs.metrics import MetricsLine, read_metrics

SIGNIFICANT_DIGITS = 6
HELD_OUT = (
    "accuracy", "kendall_tau_b", "brier", "effective_rank", "score_mean", "score_std", "score_length_correlation",
    "hidden_norm_mean", "hidden_norm_std", "hidden_norm_skewness", "final_hidden_norm_mean", "final_hidden_norm_std",
)  # fmt: skip
TRAINING = (
    "accuracy", "loss", "batch_mean_score", "score_std", "score_skewness", "margin_mean",
    "hidden_norm_mean", "hidden_norm_std", "final_hidden_norm_mean", "final_hidden_norm_std",
    "hidden_distance_mean", "final_hidden_distance_mean", "final_hidden_distance_std", "final_hidden_distance_skewness",
    "head_norm", "effective_coefficient",
)  # fmt: skip
CURVES = ("hidden_norm_mean", "hidden_norm_std", "final_hidden_distance_mean", "accuracy")
NUM_CURVE_POINTS = 24
RLOO_CURVES = ("rloo/gold_score_mean", "rloo/proxy_score_mean", "rloo/kl_mean", "rloo/completion_tokens_mean")
RLOO_EVALUATION = (
    "gold_mean",
    "sft_gold_mean",
    "win_rate",
    "length_controlled_win_rate",
    "completion_tokens_mean",
    "sft_completion_tokens_mean",
    "kl_mean",
)
Measured = tuple[dict[str, float], dict[str, list[float]]]
"""The figures and curves of a row."""


@dataclass(frozen=True)
class Row:
    """The measurements of one run."""

    key: str
    part: Part
    world: str
    variant: str
    seed: int
    seconds: float
    """Seconds that the run's own stages took, without the stages that it shares with its twins."""
    figures: Mapping[str, float]
    """Numbers by name.

    A reward model's names are <epoch>/<scenario or "train">/<metric>, with epochs from 1. RLOO's names are <metric>.
    """
    curves: Mapping[str, list[float]]
    """Values over training: means of equal parts of it for a reward model, one value per step for RLOO."""
    about: Mapping[str, str | int | float]
    """Facts about the run: counts of its data, checksums and versions."""

    @property
    def cell(self) -> Cell:
        return Cell(self.part, self.world, self.variant, self.seed)


def read_rows(path: Path) -> dict[str, Row]:
    """Return the rows of the file by key. Raises DataError for a line that is no row, and for two rows with one key."""
    rows: dict[str, Row] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines() if path.exists() else [], start=1):
        try:
            row = Row(**json.loads(line))
        except (ValueError, TypeError) as error:
            raise DataError(
                f"{path}, line {number} is no row of the study ({error}). "
                "Restore the file, or delete that line: its run is then done again."
            ) from error
        if row.key in rows:
            raise DataError(f"{path}, line {number} has the key {row.key} of an earlier line. Delete one of them.")
        rows[row.key] = row
    return rows


def write_rows(path: Path, rows: Mapping[str, Row]) -> None:
    """Write the rows in a fixed order, so that a new row changes one line of the file."""
    ordered = sorted(rows.values(), key=lambda row: (row.part, row.world, row.variant, row.seed, row.key))
    path.parent.mkdir(parents=True, exist_ok=True)
    run_files.write_text(path, "".join(json.dumps(_rounded(asdict(row)), allow_nan=False) + "\n" for row in ordered))


def _rounded(value: object) -> object:
    if isinstance(value, float):
        return float(f"{value:.{SIGNIFICANT_DIGITS}g}")
    if isinstance(value, Mapping):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list) else value


def reward_model_figures(run_dir: Path, *, num_epochs: int) -> Measured:
    """Return the figures and curves of a reward-model run.

    <epoch>/<scenario>/<metric> is measured at the end of the epoch, and <epoch>/train/<metric> is the mean over the
    epoch's steps. 0/train/<metric> is the mean over the first 5 % of all steps.
    """
    lines = read_metrics(run_dir, "reward_model")
    evaluated = [line for line in lines if "reward_model/in_domain_accuracy" in line]
    assert len(evaluated) in (num_epochs, num_epochs + 1), f"{len(evaluated)} evaluations in {num_epochs} epochs"
    # The last epoch ends with the last step, which may come one step after that epoch's evaluation.
    at_ends = [*evaluated[: num_epochs - 1], evaluated[-1]]
    figures = _training_means(lines[: max(1, len(lines) // 20)], epoch=0)
    first = 0
    for epoch, line in enumerate(at_ends, start=1):
        end = lines.index(line) + 1
        figures |= _training_means(lines[first:end], epoch=epoch)
        first = end
        keys = {
            (scenario, metric): f"reward_model/{scenario}_{metric}" for scenario in SCENARIOS for metric in HELD_OUT
        }
        figures |= {
            f"{epoch}/{scenario}/{metric}": float(line[key]) for (scenario, metric), key in keys.items() if key in line
        }
    curves = {name: _binned([float(line[f"reward_model/{name}"]) for line in lines]) for name in CURVES}
    return figures, curves


def rloo_figures(run_dir: Path) -> Measured:
    """Return the figures and curves of an RLOO run.

    The figures are means over the last tenth of the steps, the last evaluation, and the rise of the gold score in each
    half of the run (in score units).
    """
    lines = read_metrics(run_dir, "rloo")
    curves = {key.removeprefix("rloo/"): metric_series(lines, key).values.tolist() for key in RLOO_CURVES}
    num_last = max(1, len(lines) // 10)
    figures = {f"{name}_last": float(np.mean(values[-num_last:])) for name, values in curves.items()}
    gold = np.array(curves["gold_score_mean"])
    first, middle, last = (
        float(part.mean())
        for part in (gold[:num_last], gold[len(gold) // 2 - num_last : len(gold) // 2 + num_last], gold[-num_last:])
    )
    figures |= {"gold_rise_first_half": middle - first, "gold_rise_second_half": last - middle}
    evaluation = json.loads(RunLayout(run_dir).summary.read_text())["rloo"]
    figures |= {f"evaluation_{name}": float(evaluation["last_evaluation"][name]) for name in RLOO_EVALUATION}
    return figures | {"num_overoptimised_steps": float(len(evaluation["overoptimised_steps"]))}, curves


def _training_means(lines: Sequence[MetricsLine], *, epoch: int) -> dict[str, float]:
    return {
        f"{epoch}/train/{name}": float(np.mean([float(line[f"reward_model/{name}"]) for line in lines]))
        for name in TRAINING
    }


def _binned(values: list[float]) -> list[float]:
    """Return the means of NUM_CURVE_POINTS equal parts of `values`."""
    return [float(part.mean()) for part in np.array_split(np.array(values), min(NUM_CURVE_POINTS, len(values)))]
