"""Pictures of the policy: supervised fine-tuning, RLOO, proxy against gold score, and where the time went.

Each function takes plain numbers and returns one matplotlib Figure, or None when there is nothing to draw.
"""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rm_robust.report.figure_style import (
    GOLD_COLOUR,
    GREY,
    PROXY_COLOUR,
    WIDTH_INCHES,
    Panel,
    moving_mean,
    step_panels,
    ticks,
)
from rm_robust.report.record import ResponseModels, Series, judged_steps, metric_series
from rm_robust.runs.metrics import MetricsLine

ALARM_COLOUR = "#c62828"
PHASE_COLOURS = ("#2166ac", "#67a9cf", "#bf8600", "#d6604d", "#9aa5b1", "#1b9e77", "#7b3294", "#444c56")
SFT_PANELS = (
    Panel("Loss on demonstrations", "nats per token", (("sft/loss", "training"), ("sft/eval_loss", "held out"))),
)
POLICY_PANELS = (
    Panel("Entropy", "nats per token", (("rloo/entropy_mean", "mean"),)),
    Panel("Length", "tokens", (("rloo/completion_tokens_mean", "mean"),)),
    Panel("Truncated", "fraction", (("rloo/truncated_fraction", "fraction"),), 0.0),
    Panel("Reward", "proxy - costs", (("rloo/reward_mean", "mean"),)),
)
STEP_PHASES = (
    ("time/generate_s", "generate"),
    ("time/measure_s", "log-probabilities"),
    ("time/wait_for_scores_s", "wait for scores"),
    ("time/update_s", "update policy"),
    ("time/weight_sync_s", "sync weights"),
)
"""The phases of an RLOO step in their order, as (metric key, label).

Scoring runs beside the first two phases; only the wait for it adds to the step.
"""


def sft_curves(lines: list[MetricsLine]) -> Figure | None:
    """Draw training and held-out loss of supervised fine-tuning against step."""
    return step_panels(lines, SFT_PANELS, num_columns=1)


def policy_curves(lines: list[MetricsLine]) -> Figure | None:
    """Draw entropy, length, truncation and reward of the policy against RLOO step."""
    return step_panels(lines, POLICY_PANELS, num_columns=2)


def scores_by_step(lines: list[MetricsLine], response_models: ResponseModels | None) -> Figure | None:
    """Draw the proxy score (above) and the gold score (below) against RLOO step.

    Over-optimised steps are red. Horizontal lines of the gold panel show the levels of the response models.
    """
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
    bottom.xaxis.set_major_locator(ticks(7, integer=True))
    for label, level, style in _gold_levels(gold, response_models):
        bottom.axhline(level, color="black", linewidth=1.1, linestyle=style, label=f"{label}: {level:.2f}")
    if bottom.get_legend_handles_labels()[0]:
        bottom.legend(loc="upper left", bbox_to_anchor=(-0.02, -0.24), borderaxespad=0)
    return figure


def scores_by_kl(lines: list[MetricsLine]) -> Figure | None:
    """Draw proxy and gold score of each RLOO step against the KL divergence that its policy had.

    A dot's colour shows its step; a red ring marks an over-optimised step.
    """
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
        axes.plot(moving_mean(kl.values), moving_mean(score.values), color=GREY, linewidth=1.3, zorder=1)
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
    bar.locator = ticks(6, integer=True)
    bar.update_ticks()
    return figure


def stage_times(stage_seconds: dict[str, float]) -> Figure | None:
    """Draw the wall-clock seconds of each committed stage: each bar starts where the one before it stops."""
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
    """Draw the mean seconds of one RLOO step, stacked by phase. What no phase covers is "other"."""
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


def _draw_smoothed(axes: Axes, series: Series, colour: str) -> None:
    if not len(series.values):
        axes.text(0.5, 0.5, "not logged in this run", transform=axes.transAxes, ha="center", color=GREY)
        return
    axes.plot(series.steps, series.values, color=colour, alpha=0.35, linewidth=0.8, marker="o", markersize=2.5)
    axes.plot(series.steps, moving_mean(series.values), color=colour, linewidth=2.2)


def _mark_overoptimised(axes: Axes, lines: list[MetricsLine]) -> None:
    """Draw a red line at every step at which the monitor's rule held, with one entry in the legend for all of them."""
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
