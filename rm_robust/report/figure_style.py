"""The look of all pictures, and what several of them draw: curves against step, moving means, ticks and bins.

The pictures are sized for a phone: about 4.8 inches wide, with panels below each other or two side by side.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from rm_robust.report.record import FloatArray, metric_series
from rm_robust.runs.metrics import MetricsLine

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
"""The matplotlib settings of all pictures. Apply them with `matplotlib.rc_context(STYLE)` while drawing and saving.

"text.parse_math" is off because labels hold names that users chose.
"""

PROXY_COLOUR, GOLD_COLOUR, GREY = "#2166ac", "#bf8600", "#7b8794"
UNSEEN_COLOUR = "#d6604d"


@dataclass(frozen=True)
class Panel:
    """One small plot of metrics against step."""

    title: str
    y_label: str
    curves: tuple[tuple[str, str], ...]
    """The curves as (metric key, label)."""
    level: float | None = None
    """The height of a dashed reference line."""


def step_panels(lines: list[MetricsLine], panels: Sequence[Panel], *, num_columns: int) -> Figure | None:
    """Draw the panels that have at least one logged curve, left to right. Return None when there is none."""
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
    axes.xaxis.set_major_locator(ticks(4, integer=True))
    axes.yaxis.set_major_locator(ticks(4))
    if len(panel.curves) > 1:
        axes.legend(handlelength=1.2, borderaxespad=0.2)


def moving_mean(values: FloatArray) -> FloatArray:
    """Return the centred mean over about a tenth of the steps, [n] -> [n]. The window is cut at both ends."""
    half = max(1, len(values) // 20)
    return np.array([values[max(0, i - half) : i + half + 1].mean() for i in range(len(values))], dtype=np.float64)


def ticks(num_ticks: int, *, integer: bool = False) -> MaxNLocator:
    """Return a locator that places about `num_ticks` ticks at round values."""
    return MaxNLocator(num_ticks, integer=integer, steps=[1, 2, 2.5, 5, 10])
