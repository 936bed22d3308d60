"""Pictures of the reward model: its training, the four scenarios, its scores and its hidden norms.

Each function takes plain numbers and returns one matplotlib Figure, or None when there is nothing to draw.
"""

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from rm_robust.data.scenarios import SCENARIOS
from rm_robust.report.figure_style import (
    GREY,
    PROXY_COLOUR,
    UNSEEN_COLOUR,
    WIDTH_INCHES,
    Panel,
    moving_mean,
    step_panels,
    ticks,
)
from rm_robust.report.record import FloatArray, RunRecord, ScenarioScores, Series, metric_series
from rm_robust.runs.metrics import MetricsLine
from rm_robust.training.reward_model.metrics import ScenarioResult

SCENARIO_COLOURS = {
    "in_domain": "#2166ac",
    "prompt_disjoint": "#1b9e77",
    "response_disjoint": "#d6604d",
    "mutual_disjoint": "#7b3294",
}
TWIN_COLOUR = "#9aa5b1"
FAMILIAR_COLOUR = "#2166ac"
REWARD_MODEL_PANELS = (
    Panel("Objective", "loss", (("reward_model/loss", "training"),)),
    Panel(
        "Pairwise accuracy",
        "fraction",
        (("reward_model/accuracy", "training batch"), ("reward_model/in_domain_accuracy", "held out")),
        0.5,
    ),
    Panel("Margin", "chosen - rejected", (("reward_model/margin_mean", "mean"),), 0.0),
    Panel(
        "Centre and spread",
        "score",
        (("reward_model/batch_mean_score", "batch mean"), ("reward_model/score_std", "std")),
        0.0,
    ),
    Panel("Penalty (BSR term) in the loss", "loss", (("reward_model/penalty", "training"),), 0.0),
    Panel("Gradient norm", "L2 norm", (("reward_model/gradient_norm", "before clipping"),)),
    Panel("Hidden norm, mean", "‖h‖ before final norm", (("reward_model/hidden_norm_mean", "mean"),)),
    Panel("Hidden norm, spread", "std of ‖h‖", (("reward_model/hidden_norm_std", "std"),)),
    Panel(
        "Distance of a pair's hidden states",
        "‖h_w - h_l‖ after final norm",
        (("reward_model/final_hidden_distance_mean", "mean"),),
    ),
    Panel("Effective rank", "held-out hidden states", (("reward_model/in_domain_effective_rank", "held out"),)),
)


def reward_model_curves(lines: list[MetricsLine]) -> Figure | None:
    """Draw loss, accuracy, margin, scores, BSR term, gradient norm and hidden states against step."""
    return step_panels(lines, REWARD_MODEL_PANELS, num_columns=2)


def scenario_bars(evaluation: dict[str, ScenarioResult], twin: dict[str, ScenarioResult]) -> Figure | None:
    """Draw one bar per scenario, with a short dashed line across it at the value that guessing would give.

    Where the scenario was evaluated with a Bradley-Terry twin too, the twin's bar is below.
    """
    if not evaluation:
        return None
    figure = Figure(figsize=(WIDTH_INCHES, 0.8 + (0.75 if twin else 0.5) * len(evaluation)))
    axes = figure.subplots()
    for row, (name, result) in enumerate(evaluation.items()):
        chance = chance_level(result.metric)
        bars = [(result, SCENARIO_COLOURS.get(name, GREY), "")] + (
            [(twin[name], TWIN_COLOUR, " BT twin")] if name in twin else []
        )
        height = 0.6 if len(bars) == 1 else 0.4
        for bar_index, (bar_result, colour, label) in enumerate(bars):
            centre = row + (bar_index - (len(bars) - 1) / 2) * height
            axes.barh(centre, bar_result.value, height=0.95 * height, color=colour)
            axes.annotate(
                f"{bar_result.value:.3f}{label}",
                (max(bar_result.value, 0.0), centre),
                xytext=(4, 0),
                textcoords="offset points",
                va="center",
            )
        axes.plot([chance, chance], [row - 0.4, row + 0.4], color="black", linestyle=(0, (2, 1.5)), linewidth=1.2)
    axes.set_yticks(
        range(len(evaluation)),
        [f"{scenario_label(name)}\n{metric_label(result.metric)}" for name, result in evaluation.items()],
    )
    all_values = [result.value for result in (*evaluation.values(), *twin.values())]
    axes.set_xlim(min([0.0] + [1.15 * value for value in all_values]), 1.25 if twin else 1.08)
    axes.set_xlabel("value (1 is perfect; dashes: guessing)")
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    return figure


def score_histograms(scores: dict[str, ScenarioScores]) -> Figure | None:
    """Draw the reward model's scores of each scenario, one panel each, on one shared axis."""
    finite = {name: _finite(scenario.scores) for name, scenario in scores.items()}
    finite = {name: values for name, values in finite.items() if len(values)}
    if not finite:
        return None
    figure = Figure(figsize=(WIDTH_INCHES, 1.15 * len(finite) + 0.5))
    grid = figure.subplots(len(finite), 1, sharex=True, squeeze=False)[:, 0]
    bins = _bins(list(finite.values()), num_bins=40)
    for axes, (name, values) in zip(grid, finite.items(), strict=True):
        axes.hist(values, bins=bins, density=True, color=SCENARIO_COLOURS.get(name, GREY), alpha=0.85)
        axes.axvline(values.mean(), color="black", linewidth=1, linestyle="--")
        axes.set_title(scenario_label(name))
        axes.set_title(
            f"mean {values.mean():.2f}   std {values.std():.2f}", loc="right", fontweight="normal", fontsize=8.5
        )
        axes.yaxis.set_major_locator(ticks(2))
    grid[-1].set_xlabel("proxy score (raw; dashes: mean)")
    figure.supylabel("density", fontsize=9)
    return figure


def hidden_norm_histograms(scores: dict[str, ScenarioScores]) -> Figure | None:
    """Draw the norm of the scored token's hidden state, before and after the final norm.

    Responses of familiar response models (those in the training data) and of unseen ones have a colour each.
    """
    groups = {
        "training response models": (
            FAMILIAR_COLOUR,
            [scores[name] for name in ("in_domain", "prompt_disjoint") if name in scores],
        ),
        "unseen response models": (
            UNSEEN_COLOUR,
            [scores[name] for name in ("response_disjoint", "mutual_disjoint") if name in scores],
        ),
    }
    figure = Figure(figsize=(WIDTH_INCHES, 4.4))
    has_values = False
    for axes, title, field in zip(
        figure.subplots(2, 1), ("Before the final norm", "After the final norm"), ("before", "after"), strict=True
    ):
        norms = {
            label: _finite(
                np.concatenate(
                    [part.norms_before if field == "before" else part.norms_after for part in parts] or [np.empty(0)]
                )
            )
            for label, (_, parts) in groups.items()
        }
        axes.set_title(title)
        axes.set_ylabel("density")
        axes.set_xlabel("‖h‖ at the scored token (L2 norm)")
        axes.yaxis.set_major_locator(ticks(4))
        axes.ticklabel_format(useOffset=False)
        present = [values for values in norms.values() if len(values)]
        if not present:
            axes.text(0.5, 0.5, "not recorded", transform=axes.transAxes, ha="center", color=GREY)
            continue
        has_values = True
        bins = _bins(present, num_bins=40)
        for row, (label, values) in enumerate(norms.items()):
            colour = groups[label][0]
            if len(values):
                axes.hist(values, bins=bins, density=True, color=colour, alpha=0.5)
                text = f"mean {values.mean():.4g}   std {values.std():.3g}"
                axes.text(
                    0.995,
                    0.98 - 0.12 * row,
                    text,
                    transform=axes.transAxes,
                    ha="right",
                    va="top",
                    color=colour,
                    fontsize=8.5,
                )
    handles = [Patch(color=colour, alpha=0.5, label=label) for label, (colour, _) in groups.items()]
    figure.legend(handles=handles, loc="outside upper left", ncols=2, handlelength=1.2)
    return figure if has_values else None


def norm_dispersion(run: RunRecord) -> Figure | None:
    """Draw the dispersion (std / mean) of the hidden norm before the final norm.

    The upper panel shows it over training, the lower one by scenario. A Bradley-Terry twin is drawn beside the run.
    """
    named = [("this run", PROXY_COLOUR, run)] + ([("BT twin", UNSEEN_COLOUR, run.bt_twin)] if run.bt_twin else [])
    curves = {label: _dispersion_by_step(model.metrics["reward_model"]) for label, _, model in named}
    if not any(len(series.values) for series in curves.values()):
        return None
    figure = Figure(figsize=(WIDTH_INCHES, 4.6))
    top, bottom = figure.subplots(2, 1)
    for row, (label, colour, model) in enumerate(named):
        series = curves[label]
        top.plot(series.steps, series.values, color=colour, linewidth=0.7, alpha=0.35)
        top.plot(series.steps, moving_mean(series.values), color=colour, linewidth=1.8, label=label)
        norms = [
            _finite(model.scores[name].norms_before) if name in model.scores else np.empty(0) for name in SCENARIOS
        ]
        dispersions = [values.std() / values.mean() if len(values) else 0.0 for values in norms]
        bottom.bar(
            np.arange(len(SCENARIOS)) + (row - (len(named) - 1) / 2) * 0.38, dispersions, width=0.36, color=colour
        )
    top.set_title("Over training, on the training batches")
    top.set_xlabel("step")
    bottom.set_title("At the end, by scenario")
    bottom.set_xticks(range(len(SCENARIOS)), [scenario_label(name).replace("-", "-\n") for name in SCENARIOS])
    for axes in (top, bottom):
        axes.set_ylabel("std / mean of ‖h‖")
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_locator(ticks(4))
    if len(named) > 1:
        top.legend(handlelength=1.2)
    return figure


def chance_level(metric: str) -> float:
    """Return what guessing scores: half of the pairs right, or no rank correlation."""
    return 0.5 if metric == "accuracy" else 0.0


def scenario_label(name: str) -> str:
    """Return the scenario's name for people: `prompt_disjoint` -> "Prompt-disjoint"."""
    return name.replace("_", "-").capitalize()


def metric_label(metric: str) -> str:
    """Return the metric's name for people."""
    return {"accuracy": "pairwise accuracy", "kendall_tau_b": "Kendall's tau-b"}.get(metric, metric)


def _dispersion_by_step(lines: list[MetricsLine]) -> Series:
    stds, means = (metric_series(lines, f"reward_model/hidden_norm_{part}") for part in ("std", "mean"))
    return Series(stds.steps, stds.values / means.values)


def _finite(values: FloatArray) -> FloatArray:
    finite: FloatArray = values[np.isfinite(values)]
    return finite


def _bins(groups: list[FloatArray], *, num_bins: int) -> FloatArray:
    """Return bin edges that all groups share.

    A range narrower than float noise is widened, so that constant values show as one bar.
    """
    low, high = min(float(values.min()) for values in groups), max(float(values.max()) for values in groups)
    if high - low < 1e-6 * max(1.0, abs(high)):
        low, high = low - 0.5, high + 0.5
    return np.linspace(low, high, num_bins + 1, dtype=np.float64)
