"""The report's pictures: plain numbers in, one matplotlib Figure out, None when there is nothing to draw. A function per figure.

Sized for a phone: about 4.8 inches wide, panels below each other or two side by side.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from rm_robust.data.scenarios import SCENARIOS
from rm_robust.report.record import (
    FloatArray,
    ResponseModels,
    RunRecord,
    ScenarioScores,
    Series,
    judged_steps,
    metric_series,
)
from rm_robust.runs.metrics import MetricsLine
from rm_robust.training.reward_model.metrics import ScenarioResult

WIDTH_INCHES = 4.8
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e7eb",
    "axes.edgecolor": "#9aa5b1",
    "legend.edgecolor": "white",
    "legend.framealpha": 0.85,
    "legend.fontsize": 8.5,
    "figure.constrained_layout.use": True,
    "text.parse_math": False,
}
"""Apply with `matplotlib.rc_context(STYLE)` around both drawing and saving. Names come from users: never parsed as maths."""

ALARM_COLOUR = "#c62828"
PROXY_COLOUR, GOLD_COLOUR, GREY = "#2166ac", "#bf8600", "#7b8794"
FAMILIAR_COLOUR, UNSEEN_COLOUR = "#2166ac", "#d6604d"
SCENARIO_COLOURS = {
    "in_domain": "#2166ac",
    "prompt_disjoint": "#1b9e77",
    "response_disjoint": "#d6604d",
    "mutual_disjoint": "#7b3294",
}
TWIN_COLOUR = "#9aa5b1"
PHASE_COLOURS = ("#2166ac", "#67a9cf", "#bf8600", "#d6604d", "#9aa5b1", "#1b9e77", "#7b3294", "#444c56")


@dataclass(frozen=True)
class Panel:
    """One small plot against step. `curves` are (metric key, label) pairs; `level` is a dashed reference line."""

    title: str
    y_label: str
    curves: tuple[tuple[str, str], ...]
    level: float | None = None


SFT_PANELS = (
    Panel("Loss on demonstrations", "nats per token", (("sft/loss", "training"), ("sft/eval_loss", "held out"))),
)
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
POLICY_PANELS = (
    Panel("Entropy", "nats per token", (("rloo/entropy_mean", "mean"),)),
    Panel("Length", "tokens", (("rloo/completion_tokens_mean", "mean"),)),
    Panel("Truncated", "fraction", (("rloo/truncated_fraction", "fraction"),), 0.0),
    Panel("Reward", "proxy - costs", (("rloo/reward_mean", "mean"),)),
)
STEP_PHASES = (  # one after the other; scoring runs beside the first two, and only the wait for it adds to the step
    ("time/generate_s", "generate"),
    ("time/measure_s", "log-probabilities"),
    ("time/wait_for_scores_s", "wait for scores"),
    ("time/update_s", "update policy"),
    ("time/weight_sync_s", "sync weights"),
)


def sft_curves(lines: list[MetricsLine]) -> Figure | None:
    """Training and held-out loss of supervised fine-tuning against step."""
    return _step_panels(lines, SFT_PANELS, num_columns=1)


def reward_model_curves(lines: list[MetricsLine]) -> Figure | None:
    """Loss, accuracy, margin, score centre and spread, BSR term, gradient and hidden norm of the reward model against step."""
    return _step_panels(lines, REWARD_MODEL_PANELS, num_columns=2)


def policy_curves(lines: list[MetricsLine]) -> Figure | None:
    """Entropy, length, truncation and reward of the policy against RLOO step."""
    return _step_panels(lines, POLICY_PANELS, num_columns=2)


def scenario_bars(evaluation: dict[str, ScenarioResult], twin: dict[str, ScenarioResult]) -> Figure | None:
    """One bar per scenario, with the value that guessing would give as a short dashed line across the bar; below it the Bradley-Terry twin's, if any."""
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
        for place, (own, colour, label) in enumerate(bars):
            centre = row + (place - (len(bars) - 1) / 2) * height
            axes.barh(centre, own.value, height=0.95 * height, color=colour)
            axes.annotate(
                f"{own.value:.3f}{label}",
                (max(own.value, 0.0), centre),
                xytext=(4, 0),
                textcoords="offset points",
                va="center",
            )
        axes.plot([chance, chance], [row - 0.4, row + 0.4], color="black", linestyle=(0, (2, 1.5)), linewidth=1.2)
    axes.set_yticks(
        range(len(evaluation)),
        [f"{scenario_label(name)}\n{metric_label(result.metric)}" for name, result in evaluation.items()],
    )
    everyone = [result.value for result in (*evaluation.values(), *twin.values())]
    axes.set_xlim(min([0.0] + [1.15 * value for value in everyone]), 1.25 if twin else 1.08)
    axes.set_xlabel("value (1 is perfect; dashes: guessing)")
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    return figure


def score_histograms(scores: dict[str, ScenarioScores]) -> Figure | None:
    """Reward-model scores per scenario, one panel each, on one shared axis."""
    finite = {name: _finite(part.scores) for name, part in scores.items()}
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
        axes.yaxis.set_major_locator(_ticks(2))
    grid[-1].set_xlabel("proxy score (raw; dashes: mean)")
    figure.supylabel("density", fontsize=9)
    return figure


def hidden_norm_histograms(scores: dict[str, ScenarioScores]) -> Figure | None:
    """Norm of the scored token's hidden state, before and after the final norm: familiar against unseen response models."""
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
        axes.yaxis.set_major_locator(_ticks(4))
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
    """Dispersion (std / mean) of the hidden norm before the final norm: over training above, of each scenario below; the Bradley-Terry twin beside it."""
    named = [("this run", PROXY_COLOUR, run)] + ([("BT twin", UNSEEN_COLOUR, run.bt_twin)] if run.bt_twin else [])
    curves = {label: _dispersion_by_step(own.metrics["reward_model"]) for label, _, own in named}
    if not any(len(series.values) for series in curves.values()):
        return None
    figure = Figure(figsize=(WIDTH_INCHES, 4.6))
    top, bottom = figure.subplots(2, 1)
    for row, (label, colour, own) in enumerate(named):
        series = curves[label]
        top.plot(series.steps, series.values, color=colour, linewidth=0.7, alpha=0.35)
        top.plot(series.steps, _moving_mean(series.values), color=colour, linewidth=1.8, label=label)
        spreads = [_finite(own.scores[name].norms_before) if name in own.scores else np.empty(0) for name in SCENARIOS]
        heights = [values.std() / values.mean() if len(values) else 0.0 for values in spreads]
        bottom.bar(np.arange(len(SCENARIOS)) + (row - (len(named) - 1) / 2) * 0.38, heights, width=0.36, color=colour)
    top.set_title("Over training, on the training batches")
    top.set_xlabel("step")
    bottom.set_title("At the end, by scenario")
    bottom.set_xticks(range(len(SCENARIOS)), [scenario_label(name).replace("-", "-\n") for name in SCENARIOS])
    for axes in (top, bottom):
        axes.set_ylabel("std / mean of ‖h‖")
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_locator(_ticks(4))
    if len(named) > 1:
        top.legend(handlelength=1.2)
    return figure


def _dispersion_by_step(lines: list[MetricsLine]) -> Series:
    stds, means = (metric_series(lines, f"reward_model/hidden_norm_{part}") for part in ("std", "mean"))
    return Series(stds.steps, stds.values / means.values)


def scores_by_step(lines: list[MetricsLine], response_models: ResponseModels | None) -> Figure | None:
    """Proxy score above, gold score below, against RLOO step; over-optimised steps in red; the response models as horizontal lines of the gold panel."""
    proxy, gold = metric_series(lines, "rloo/proxy_score_mean"), metric_series(lines, "rloo/gold_score_mean")
    if not len(proxy.values) and not len(gold.values):
        return None
    figure = Figure(figsize=(WIDTH_INCHES, 5.4))
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(1, 1.35))
    for axes in (top, bottom):
        _mark_overoptimised(axes, lines)
    _draw_smoothed(top, proxy, PROXY_COLOUR)
    _draw_smoothed(bottom, gold, GOLD_COLOUR)
    top.set_title("Proxy: the reward model under study")
    bottom.set_title("Gold: the judge")
    top.set_ylabel("mean proxy score")
    bottom.set_ylabel("mean gold score")
    bottom.set_xlabel("RLOO step")
    bottom.xaxis.set_major_locator(_ticks(7, integer=True))
    for label, level, style in _gold_levels(gold, response_models):
        bottom.axhline(level, color="black", linewidth=1.1, linestyle=style, label=f"{label}: {level:.2f}")
    if bottom.get_legend_handles_labels()[0]:
        bottom.legend(loc="upper left", bbox_to_anchor=(-0.02, -0.24), borderaxespad=0)
    return figure


def scores_by_kl(lines: list[MetricsLine]) -> Figure | None:
    """Proxy and gold score of each RLOO step against the KL divergence its policy had; colour is the step, a red ring an over-optimised one."""
    keys = ("rloo/proxy_score_mean", "rloo/gold_score_mean")
    drawn = [key for key in keys if any(key in line and "rloo/kl_mean" in line for line in lines)]
    if not drawn:
        return None
    overoptimised = {judged.step for judged in judged_steps(lines) if judged.is_overoptimised}
    figure = Figure(figsize=(WIDTH_INCHES, 2.4 * len(drawn) + 0.2))
    grid = figure.subplots(len(drawn), 1, sharex=True, squeeze=False)[:, 0]
    for axes, key in zip(grid, drawn, strict=True):
        both = [line for line in lines if key in line and "rloo/kl_mean" in line]
        kl, score = metric_series(both, "rloo/kl_mean"), metric_series(both, key)
        axes.plot(_moving_mean(kl.values), _moving_mean(score.values), color=GREY, linewidth=1.3, zorder=1)
        dots = axes.scatter(kl.values, score.values, c=kl.steps, cmap="viridis", s=16, zorder=2)
        marked = [line for line in both if line["step"] in overoptimised]
        axes.scatter(
            [float(line["rloo/kl_mean"]) for line in marked],
            [float(line[key]) for line in marked],
            s=34,
            facecolors="none",
            edgecolors=ALARM_COLOUR,
        )
        axes.set_title("Proxy score" if key == keys[0] else "Gold score")
        axes.set_ylabel(f"mean {'proxy' if key == keys[0] else 'gold'} score")
    grid[-1].set_xlabel("KL to the SFT policy (nats per completion)")
    bar = figure.colorbar(dots, ax=list(grid), label="RLOO step", aspect=40, pad=0.02)
    bar.outline.set_visible(False)
    bar.locator = _ticks(6, integer=True)
    bar.update_ticks()
    return figure


def stage_times(stage_seconds: dict[str, float]) -> Figure | None:
    """Wall-clock seconds of each committed stage, end to end: each bar starts where the one before it stopped."""
    if not stage_seconds:
        return None
    figure = Figure(figsize=(WIDTH_INCHES, 0.9 + 0.3 * len(stage_seconds)))
    axes = figure.subplots()
    total_s, start_s = sum(stage_seconds.values()), 0.0
    for row, (seconds, colour) in enumerate(
        zip(stage_seconds.values(), PHASE_COLOURS * len(stage_seconds), strict=False)
    ):
        axes.barh(row, seconds, left=start_s, height=0.65, color=colour)
        is_late = start_s + seconds / 2 > total_s * 0.6
        anchor, offset, align = (start_s, -4, "right") if is_late else (start_s + seconds, 4, "left")
        axes.annotate(
            f"{seconds:.1f} s",
            (anchor, row),
            xytext=(offset, 0),
            textcoords="offset points",
            va="center",
            ha=align,
            fontsize=8.5,
        )
        start_s += seconds
    axes.set_yticks(range(len(stage_seconds)), list(stage_seconds))
    axes.invert_yaxis()
    axes.set_xlim(0, max(total_s, 1e-9))
    axes.set_xlabel("seconds since the first stage began (stages only)")
    axes.grid(visible=False, axis="y")
    return figure


def step_times(lines: list[MetricsLine]) -> Figure | None:
    """Mean seconds of one RLOO step, stacked by phase. The rest is "other"."""
    series = [(label, metric_series(lines, key).values) for key, label in STEP_PHASES]
    means = [(label, float(values.mean())) for label, values in series if len(values)]
    if not means:
        return None
    steps = metric_series(lines, "time/step_s").values
    if len(steps):
        means.append(("other", max(0.0, float(steps.mean()) - sum(seconds for _, seconds in means))))
    figure = Figure(figsize=(WIDTH_INCHES, 2.2))
    axes = figure.subplots()
    total_s, start_s = sum(seconds for _, seconds in means), 0.0
    for (label, seconds), colour in zip(means, PHASE_COLOURS, strict=False):
        share = 100 * seconds / total_s if total_s else 0.0
        axes.barh(0, seconds, left=start_s, height=0.6, color=colour, label=f"{label}: {seconds:.2f} s ({share:.0f} %)")
        start_s += seconds
    axes.set_yticks([])
    axes.set_xlabel("mean seconds per RLOO step")
    axes.grid(visible=False, axis="y")
    axes.legend(
        loc="lower left", bbox_to_anchor=(-0.02, 1.0), ncols=2, borderaxespad=0, handlelength=1.2, columnspacing=1.2
    )
    return figure


def chance_level(metric: str) -> float:
    """What guessing scores: half of the pairs right, or no rank correlation."""
    return 0.5 if metric == "accuracy" else 0.0


def scenario_label(name: str) -> str:
    """`prompt_disjoint` -> "Prompt-disjoint"."""
    return name.replace("_", "-").capitalize()


def metric_label(metric: str) -> str:
    """The metric's name for people."""
    return {"accuracy": "pairwise accuracy", "kendall_tau_b": "Kendall's tau-b"}.get(metric, metric)


def _step_panels(lines: list[MetricsLine], panels: Sequence[Panel], *, num_columns: int) -> Figure | None:
    """The panels that have at least one logged curve, in their order, left to right."""
    present = [panel for panel in panels if any(key in line for line in lines for key, _ in panel.curves)]
    if not present:
        return None
    num_columns = min(num_columns, len(present))
    num_rows = -(-len(present) // num_columns)
    figure = Figure(figsize=(WIDTH_INCHES, (2.6 if num_columns == 1 else 1.9) * num_rows))
    grid = figure.subplots(num_rows, num_columns, squeeze=False).ravel()
    for axes, panel in zip(grid, present, strict=False):
        _draw_panel(axes, lines, panel)
    for axes in grid[len(present) :]:
        axes.set_visible(False)
    for axes in grid[max(0, len(present) - num_columns) : len(present)]:
        axes.set_xlabel("step")
    return figure


def _draw_panel(axes: Axes, lines: list[MetricsLine], panel: Panel) -> None:
    for (key, label), colour in zip(panel.curves, (PROXY_COLOUR, UNSEEN_COLOUR), strict=False):
        series = metric_series(lines, key)
        if len(series.values):
            is_sparse = len(series.values) <= 12
            axes.plot(
                series.steps,
                series.values,
                color=colour,
                linewidth=1.4,
                marker="o" if is_sparse else "",
                markersize=3.5,
                label=label,
            )
    if panel.level is not None:
        axes.axhline(panel.level, color="black", linewidth=0.8, linestyle="--")
    axes.set_title(panel.title)
    axes.set_ylabel(panel.y_label)
    axes.xaxis.set_major_locator(_ticks(4, integer=True))
    axes.yaxis.set_major_locator(_ticks(4))
    if len(panel.curves) > 1:
        axes.legend(handlelength=1.2, borderaxespad=0.2)


def _draw_smoothed(axes: Axes, series: Series, colour: str) -> None:
    if not len(series.values):
        axes.text(0.5, 0.5, "not logged in this run", transform=axes.transAxes, ha="center", color=GREY)
        return
    axes.plot(series.steps, series.values, color=colour, alpha=0.35, linewidth=0.8, marker="o", markersize=2.5)
    axes.plot(series.steps, _moving_mean(series.values), color=colour, linewidth=2.2)


def _mark_overoptimised(axes: Axes, lines: list[MetricsLine]) -> None:
    """A red line at every step at which the monitor's rule held; one entry for all of them in the legend."""
    steps = [judged.step for judged in judged_steps(lines) if judged.is_overoptimised]
    for index, step in enumerate(steps):
        axes.axvline(
            step,
            color=ALARM_COLOUR,
            alpha=0.3,
            linewidth=2,
            zorder=0,
            label=f"over-optimised: {len(steps)} steps" if index == 0 else None,
        )


def _moving_mean(values: FloatArray) -> FloatArray:
    """Centred mean over about a tenth of the steps; the window is cut at both ends. [n] -> [n]."""
    half = max(1, len(values) // 20)
    return np.array([values[max(0, i - half) : i + half + 1].mean() for i in range(len(values))], dtype=np.float64)


def _gold_levels(gold: Series, response_models: ResponseModels | None) -> list[tuple[str, float, str]]:
    levels = [("SFT policy (first step)", float(gold.values[0]), ":")] if len(gold.values) else []
    if response_models is not None:
        everyone = response_models.training | response_models.unseen
        if response_models.training:
            levels.append(
                ("median training response model", float(np.median(list(response_models.training.values()))), "-.")
            )
        if everyone:
            best = max(everyone, key=lambda name: everyone[name])
            levels.append((f"ceiling: best response model, {best}", everyone[best], "--"))
    return levels


def _ticks(num_ticks: int, *, integer: bool = False) -> MaxNLocator:
    """Round tick values, about so many."""
    return MaxNLocator(num_ticks, integer=integer, steps=[1, 2, 2.5, 5, 10])


def _finite(values: FloatArray) -> FloatArray:
    finite: FloatArray = values[np.isfinite(values)]
    return finite


def _bins(groups: list[FloatArray], *, num_bins: int) -> FloatArray:
    """Shared bin edges; a range that is narrower than float noise is widened so that constant values show as one bar."""
    low, high = min(float(values.min()) for values in groups), max(float(values.max()) for values in groups)
    if high - low < 1e-6 * max(1.0, abs(high)):
        low, high = low - 0.5, high + 0.5
    return np.linspace(low, high, num_bins + 1, dtype=np.float64)
