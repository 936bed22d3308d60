"""From a finished run's own files to the numbers of its row. Nothing here trains, and nothing here knows of other runs."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from rm_robust.run_layout import RunLayout
from rm_robust.run_record import SCENARIOS, metric_series
from rm_robust.tracking import MetricsLine, read_metrics

HELD_OUT = (
    "accuracy", "kendall_tau_b", "brier", "effective_rank", "score_mean", "score_std", "score_length_correlation",
    "hidden_norm_mean", "hidden_norm_std", "hidden_norm_skewness", "final_hidden_norm_mean", "final_hidden_norm_std",
)  # fmt: skip
TRAINING = (
    "accuracy", "loss", "batch_mean_score", "score_std", "score_skewness", "margin_mean", "hidden_norm_mean", "hidden_norm_std",
    "final_hidden_norm_mean", "final_hidden_norm_std", "hidden_distance_mean", "final_hidden_distance_mean", "final_hidden_distance_std",
    "final_hidden_distance_skewness", "head_norm",
    "effective_coefficient",
)  # fmt: skip
CURVES = ("hidden_norm_mean", "hidden_norm_std", "final_hidden_distance_mean", "accuracy")
NUM_CURVE_POINTS = 24
RLOO_CURVES = ("rloo/gold_score_mean", "rloo/proxy_score_mean", "rloo/kl_mean", "rloo/completion_tokens_mean")
RLOO_EVALUATION = ("gold_mean", "sft_gold_mean", "win_rate", "length_controlled_win_rate", "completion_tokens_mean", "sft_completion_tokens_mean", "kl_mean")

Measured = tuple[dict[str, float], dict[str, list[float]]]
"""Figures and curves of a row."""


def reward_model_figures(run_dir: Path, *, num_epochs: int) -> Measured:
    """<epoch>/<scenario>/<metric> at the end of each epoch, <epoch>/train/<metric> as the mean over the epoch's steps, 0/train/… over the first 5 %."""
    lines = read_metrics(run_dir, "reward_model")
    evaluated = [line for line in lines if "reward_model/in_domain_accuracy" in line]
    assert len(evaluated) in (num_epochs, num_epochs + 1), f"{len(evaluated)} evaluations in {num_epochs} epochs"
    at_ends = [*evaluated[: num_epochs - 1], evaluated[-1]]  # the last epoch ends with the last step, which may come a step after its evaluation
    figures = _training_means(lines[: max(1, len(lines) // 20)], epoch=0)
    first = 0
    for epoch, line in enumerate(at_ends, start=1):
        end = lines.index(line) + 1
        figures |= _training_means(lines[first:end], epoch=epoch)
        first = end
        keys = {(scenario, metric): f"reward_model/{scenario}_{metric}" for scenario in SCENARIOS for metric in HELD_OUT}
        figures |= {f"{epoch}/{scenario}/{metric}": float(line[key]) for (scenario, metric), key in keys.items() if key in line}
    curves = {name: _binned([float(line[f"reward_model/{name}"]) for line in lines]) for name in CURVES}
    return figures, curves


def rloo_figures(run_dir: Path) -> Measured:
    """Means of the last tenth of the steps, of the last evaluation, and gold's rise in each half of the run (score units)."""
    lines = read_metrics(run_dir, "rloo")
    curves = {key.removeprefix("rloo/"): metric_series(lines, key).values.tolist() for key in RLOO_CURVES}
    num_last = max(1, len(lines) // 10)
    figures = {f"{name}_last": float(np.mean(values[-num_last:])) for name, values in curves.items()}
    gold = np.array(curves["gold_score_mean"])
    first, middle, last = (float(part.mean()) for part in (gold[:num_last], gold[len(gold) // 2 - num_last : len(gold) // 2 + num_last], gold[-num_last:]))
    figures |= {"gold_rise_first_half": middle - first, "gold_rise_second_half": last - middle}
    evaluation = json.loads(RunLayout(run_dir).summary.read_text())["rloo"]
    figures |= {f"evaluation_{name}": float(evaluation["last_evaluation"][name]) for name in RLOO_EVALUATION}
    return figures | {"num_overoptimised_steps": float(len(evaluation["overoptimised_steps"]))}, curves


def _training_means(lines: Sequence[MetricsLine], *, epoch: int) -> dict[str, float]:
    return {f"{epoch}/train/{name}": float(np.mean([float(line[f"reward_model/{name}"]) for line in lines])) for name in TRAINING}


def _binned(values: list[float]) -> list[float]:
    """Means of NUM_CURVE_POINTS equal parts."""
    return [float(part.mean()) for part in np.array_split(np.array(values), min(NUM_CURVE_POINTS, len(values)))]
