"""`report.html` beside result.json: the figures and pictures of an evaluation, in one file that loads nothing.

The page is made from the result alone. page.html.jinja has its sections; this file computes what they show.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from rm_robust.report.figure_style import GOLD_COLOUR, GREY, PROXY_COLOUR, STYLE, WIDTH_INCHES
from rm_robust.report.html import inline_png, render
from rm_robust.runs import files as run_files

STYLES = ("concise", "detailed", "detailed, Markdown")
"""RM-Bench's styles of an answer, in the order of the rows and columns of its matrix."""


@dataclass(frozen=True)
class FigureTable:
    """A table of figures: the heads of its columns of numbers, and its rows as (figure, numbers)."""

    heads: list[str]
    rows: list[tuple[str, list[str]]]


def write_page(result: dict[str, Any], folder: Path) -> Path:
    """Make `folder/report.html` and return its path."""
    with matplotlib.rc_context(STYLE):
        html = render(
            "evaluation/page.html.jinja",
            title=f"{result['suite']}: {result['num_cases'] - result['num_refused']} of {result['num_cases']} cases",
            result=result,
            figures=_table(result["figures"]),
            differences=_table(result["against"]["differences"]) if "against" in result else None,
            reliability=inline_png(reliability_curve(result.get("reliability", []))),
            best_of_n=inline_png(best_of_n_curve(result["figures"])),
            styles=inline_png(style_matrix(result.get("style_matrix"))),
        )
    path = folder / "report.html"
    run_files.write_text(path, html)
    return path


def reliability_curve(bins: Sequence[Mapping[str, float]]) -> Figure | None:
    """Draw the accuracy of each bin of pairs against its mean confidence."""
    if not bins:
        return None
    figure = Figure(figsize=(WIDTH_INCHES, WIDTH_INCHES * 0.8))
    axes = figure.subplots()
    axes.plot([0.5, 1], [0.5, 1], linestyle="--", color=GREY)
    axes.plot(
        [bin_["mean_confidence"] for bin_ in bins], [bin_["accuracy"] for bin_ in bins], marker="o", color=PROXY_COLOUR
    )
    for bin_ in bins:
        axes.annotate(
            f"{bin_['num_pairs']}",
            (bin_["mean_confidence"], bin_["accuracy"]),
            textcoords="offset points",
            xytext=(4, -11),
            fontsize=7.5,
        )
    axes.set(xlabel="confidence σ(|margin|)", ylabel="share of pairs ordered right", xlim=(0.48, 1.02), ylim=(0, 1.05))
    return figure


def best_of_n_curve(figures: Mapping[str, Mapping[str, float | None]]) -> Figure | None:
    """Draw gold against the KL divergence of best of n, log n − (n − 1)/n (Stiennon et al. 2020, appendix G.3)."""
    points = {
        int(name.rpartition("_")[2]): estimate
        for name, estimate in figures.items()
        if name.startswith("all.best_of_") and estimate["value"] is not None
    }
    if len(points) < 2:
        return None
    counts = sorted(points)
    divergences = [math.log(n) - (n - 1) / n for n in counts]
    values = [float(points[n]["value"] or 0.0) for n in counts]
    lows, highs = (
        [float(value if (bound := points[n][side]) is None else bound) for n, value in zip(counts, values, strict=True)]
        for side in ("low", "high")
    )
    figure = Figure(figsize=(WIDTH_INCHES, WIDTH_INCHES * 0.8))
    axes = figure.subplots()
    # A percentile interval need not hold the value, so an error can be below 0.
    errors = np.array([np.subtract(values, lows), np.subtract(highs, values)])
    axes.errorbar(divergences, values, yerr=errors.clip(min=0), marker="o", capsize=3, color=GOLD_COLOUR)
    for n, divergence, value in zip(counts, divergences, values, strict=True):
        axes.annotate(f"n = {n}", (divergence, value), textcoords="offset points", xytext=(6, -11), fontsize=7.5)
    axes.set(xlabel="KL divergence (nats)", ylabel="gold score of the pick")
    return figure


def style_matrix(matrix_IJ: Sequence[Sequence[float]] | None) -> Figure | None:
    """Draw RM-Bench's matrix of styles."""
    if matrix_IJ is None:
        return None
    figure = Figure(figsize=(WIDTH_INCHES, WIDTH_INCHES * 0.8))
    axes = figure.subplots()
    axes.imshow(matrix_IJ, vmin=0, vmax=1, cmap="RdYlBu")
    axes.grid(visible=False)
    axes.set_xticks(range(len(STYLES)), [f"rejected\n{style}" for style in STYLES], fontsize=7.5)
    axes.set_yticks(range(len(STYLES)), [f"chosen\n{style}" for style in STYLES], fontsize=7.5)
    for i, row in enumerate(matrix_IJ):
        for j, value in enumerate(row):
            axes.text(j, i, f"{value:.2f}", ha="center", va="center", color="black" if 0.2 < value < 0.8 else "white")
    return figure


def _table(figures: Mapping[str, Mapping[str, float | None]]) -> FigureTable:
    """Return a row per figure, with a p-value where figures have one."""
    has_p_value = any("p_value" in figure for figure in figures.values())
    columns = ["value", "low", "high", *(["p_value"] if has_p_value else [])]
    return FigureTable(
        heads=[column.replace("_", "-") for column in columns],
        rows=[(name, [_number(figure.get(column)) for column in columns]) for name, figure in figures.items()],
    )


def _number(value: float | None) -> str:
    return "—" if value is None else f"{value:.4f}"
