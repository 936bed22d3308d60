"""Draw the study's pictures from its rows alone.

Each function draws one figure, and returns None if there is nothing to draw. The same rows give the same bytes.
"""

from collections.abc import Sequence
from functools import partial

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from research.study.claims import LAST_EPOCH, dispersion, rank_agreement
from research.study.grid import PAPERS_BSR, VARIANTS
from research.study.rows import Row
from research.study.statistics import Interval, over_seeds, t_interval
from rm_robust.data.scenarios import SCENARIOS
from rm_robust.report.reward_model_figures import scenario_label

COLOURS = dict(
    zip(
        VARIANTS,
        ("#d6604d", "#bf8600", "#8c510a", "#7b8794", "#1b9e77", "#a6cee3", "#2166ac", "#08306b", "#7b3294"),
        strict=True,
    )
)
COMPARED = ("bt", PAPERS_BSR)
WORLD_TITLES = {"embedded": "embedded world", "rmb": "RMB's real pairs"}


def scenarios(rows: Sequence[Row], world: str) -> Figure | None:
    """Draw the four scenarios after the last epoch: for each objective, the mean over seeds with its interval."""
    world_rows = [row for row in rows if row.part == "reward_model" and row.world == world]
    if not world_rows:
        return None
    figure = Figure(figsize=(7.5, 3.4))
    for axes, scenario in zip(figure.subplots(1, len(SCENARIOS), sharey=True), SCENARIOS, strict=True):
        agreement = partial(rank_agreement, epoch=LAST_EPOCH, scenario=scenario)
        for height, variant in enumerate(VARIANTS):
            interval = over_seeds(world_rows, world, variant, agreement)
            if interval is not None:
                _draw_interval(axes, interval, height, COLOURS[variant])
        is_ranking = any(f"{LAST_EPOCH}/{scenario}/kendall_tau_b" in row.figures for row in world_rows)
        axes.set_title(scenario_label(scenario))
        axes.set_xlabel("Kendall's tau-b" if is_ranking else "accuracy")
        axes.set_yticks(range(len(VARIANTS)), list(VARIANTS))
        axes.set_ylim(len(VARIANTS) - 0.5, -0.5)
    figure.suptitle(f"{WORLD_TITLES[world]}: after {LAST_EPOCH} epochs, mean and 95 % interval over seeds", fontsize=9)
    return figure


def by_epoch(rows: Sequence[Row], world: str) -> Figure | None:
    """Draw how well BT and BSR agree with gold at the end of every epoch."""
    world_rows = [row for row in rows if row.part == "reward_model" and row.world == world]
    if not any(row.variant in COMPARED for row in world_rows):
        return None
    figure = Figure(figsize=(7.5, 2.6))
    epochs = range(1, LAST_EPOCH + 1)
    for axes, scenario in zip(figure.subplots(1, len(SCENARIOS)), SCENARIOS, strict=True):
        for shift, variant in zip((-0.05, 0.05), COMPARED, strict=True):
            intervals = [
                over_seeds(world_rows, world, variant, partial(rank_agreement, epoch=epoch, scenario=scenario))
                for epoch in epochs
            ]
            known = [
                (epoch + shift, interval)
                for epoch, interval in zip(epochs, intervals, strict=True)
                if interval is not None
            ]
            axes.plot(
                [x for x, _ in known],
                [i.mean for _, i in known],
                color=COLOURS[variant],
                marker="o",
                markersize=3.5,
                label=variant,
            )
            axes.vlines(
                [x for x, _ in known],
                [i.low for _, i in known],
                [i.high for _, i in known],
                color=COLOURS[variant],
                linewidth=1,
            )
        axes.set_title(scenario_label(scenario))
        axes.set_xticks(list(epochs))
        axes.set_xlabel("epochs")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    # The legend stays outside, so that it hides no interval.
    figure.legend(handles, labels, loc="outside upper right", ncols=len(labels), handlelength=1.2)
    figure.suptitle(WORLD_TITLES[world], fontsize=9)
    return figure


def dispersion_over_training(rows: Sequence[Row], world: str) -> Figure | None:
    """Draw the hidden norms over training (mean over seeds with its interval), and their dispersion at the end.

    The dispersion is shown for training and for each scenario.
    """
    world_rows = [row for row in rows if row.part == "reward_model" and row.world == world and row.variant in COMPARED]
    if not world_rows:
        return None
    figure = Figure(figsize=(7.5, 2.8))
    left, middle, right = figure.subplots(1, 3)
    for number, variant in enumerate(COMPARED):
        variant_rows = [row for row in world_rows if row.variant == variant]
        if not variant_rows:
            continue
        _band(
            left,
            [
                [s / m for s, m in zip(row.curves["hidden_norm_std"], row.curves["hidden_norm_mean"], strict=True)]
                for row in variant_rows
            ],
            variant,
        )
        _band(middle, [row.curves["final_hidden_distance_mean"] for row in variant_rows], variant)
        for index, where in enumerate(("train", *SCENARIOS)):
            interval = over_seeds(world_rows, world, variant, partial(dispersion, where=f"{LAST_EPOCH}/{where}"))
            if interval is not None:
                _draw_interval(right, interval, index + 0.2 * (number - 0.5), COLOURS[variant])
    left.set_title("std / mean of ‖h‖")
    middle.set_title("‖h_w - h_l‖, final norm")
    right.set_title("… at the end")
    for axes in (left, middle):
        axes.set_xlabel("epochs of training")
    right.set_yticks(range(1 + len(SCENARIOS)), ["train", *map(scenario_label, SCENARIOS)])
    right.invert_yaxis()
    left.legend(handlelength=1.2)
    figure.suptitle(WORLD_TITLES[world], fontsize=9)
    return figure


def gold_by_kl(rows: Sequence[Row]) -> Figure | None:
    """Draw gold score, proxy score and length of every RLOO step against KL.

    Each seed has one curve, smoothed over a tenth of the steps.
    """
    rloo_rows = [row for row in rows if row.part == "rloo"]
    if not rloo_rows:
        return None
    figure = Figure(figsize=(7.5, 2.9))
    panels = {
        "gold_score_mean": "Gold score",
        "proxy_score_mean": "Proxy score",
        "completion_tokens_mean": "Tokens a completion",
    }
    for axes, (name, title) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        labelled = set()
        for row in rloo_rows:
            label = None if row.variant in labelled else row.variant
            labelled.add(row.variant)
            axes.plot(
                _smoothed(row.curves["kl_mean"]),
                _smoothed(row.curves[name]),
                color=COLOURS[row.variant],
                linewidth=1.3,
                label=label,
            )
        axes.set_title(title)
        axes.set_xlabel("KL to the SFT policy (nats)")
    figure.axes[0].legend(handlelength=1.2)
    return figure


def _draw_interval(axes: Axes, interval: Interval, height: float, colour: str) -> None:
    axes.plot([interval.low, interval.high], [height, height], color=colour, linewidth=1.8)
    axes.plot([interval.mean], [height], color=colour, marker="o", markersize=4)


def _band(axes: Axes, curves: list[list[float]], variant: str) -> None:
    x = (np.arange(len(curves[0])) + 0.5) * LAST_EPOCH / len(curves[0])
    intervals = [t_interval(list(values)) for values in zip(*curves, strict=True)]
    axes.plot(x, [interval.mean for interval in intervals], color=COLOURS[variant], linewidth=1.5, label=variant)
    axes.fill_between(
        x,
        [interval.low for interval in intervals],
        [interval.high for interval in intervals],
        color=COLOURS[variant],
        alpha=0.2,
        linewidth=0,
    )


def _smoothed(values: list[float]) -> list[float]:
    half = max(1, len(values) // 20)
    return [float(np.mean(values[max(0, i - half) : i + half + 1])) for i in range(len(values))]
