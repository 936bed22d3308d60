"""`report.html` beside result.json: an evaluation's figures and pictures, made from the result alone; it loads nothing."""

import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from rm_robust.report.figures import GOLD_COLOUR, GREY, PROXY_COLOUR, STYLE, WIDTH_INCHES
from rm_robust.report.html import figure_grid, page, picture, section, warning
from rm_robust.runs.storage.commits import write_text_atomic

STYLES = ("concise", "detailed", "detailed, Markdown")
_RELIABILITY = (
    "Pairs by how sure the model is, σ(|margin|), against how often it is right; the number of pairs stands at each point. On the dashes its probabilities can "
    "be taken at their word; below them it is surer than it should be."
)
_BEST_OF_N = (
    "Gold score of the completion that the model picks among n of a prompt's own, against the KL divergence that picking costs, log n − (n−1)/n nats. Where a "
    "model is over-optimised gold bends down as n grows. Prompts of fewer than n completions are not in the point of n. Bars: the interval."
)
_STYLE_MATRIX = (
    "Share of prompts on which the right answer in the row's style beats the wrong one in the column's. Below the diagonal style speaks for the right answer, "
    "above it for the wrong one."
)


def write_page(result: dict[str, Any], folder: Path) -> Path:
    """Make `folder/report.html` and return its path."""
    title = f"{result['suite']}: {result['num_cases'] - result['num_refused']} of {result['num_cases']} cases"
    with matplotlib.rc_context(STYLE):
        pictures = [
            picture(name, figure, caption, "")
            for name, figure, caption in (
                ("Reliability", reliability_curve(result.get("reliability", [])), _RELIABILITY),
                ("Best of n", best_of_n_curve(result["figures"]), _BEST_OF_N),
                ("Styles", style_matrix(result.get("style_matrix")), _STYLE_MATRIX),
            )
            if figure is not None
        ]
    body = [
        f"<h1>{escape(title)}</h1>",
        f"<p>Checkpoint <code>{escape(result['checkpoint'])}</code></p>",
        *(warning(note) for note in result["notes"]),
    ]
    body.append(
        section(
            "Figures",
            f"<p>Intervals: {escape(result['interval'])}.</p>",
            _table(result["figures"]),
            figure_grid(*pictures),
        )
    )
    if "against" in result:
        against = result["against"]
        head = f"<p>Minus checkpoint <code>{escape(against['checkpoint'])}</code>, on the {against['num_cases']} cases that both have scores of.</p>"
        body.append(section("Compared", head, _table(against["differences"])))
    files = "".join(
        f"<li>{escape(file['path'])}, <code>{escape(file['sha256'])}</code></li>" for file in result["files"]
    )
    body.append(
        section(
            "Data and versions",
            f"<ul>{files}</ul>",
            f"<p>{escape(', '.join(f'{name} {own}' for name, own in result['versions'].items()))}</p>",
        )
    )
    path = folder / "report.html"
    write_text_atomic(path, page(title, "\n".join(body)))
    return path


def reliability_curve(bins: Sequence[Mapping[str, float]]) -> Figure | None:
    """Accuracy against mean confidence of the suite's bins."""
    if not bins:
        return None
    figure = Figure(figsize=(WIDTH_INCHES, WIDTH_INCHES * 0.8))
    axes = figure.subplots()
    axes.plot([0.5, 1], [0.5, 1], linestyle="--", color=GREY)
    axes.plot(
        [own["mean_confidence"] for own in bins], [own["accuracy"] for own in bins], marker="o", color=PROXY_COLOUR
    )
    for own in bins:
        axes.annotate(
            f"{own['num_pairs']}",
            (own["mean_confidence"], own["accuracy"]),
            textcoords="offset points",
            xytext=(4, -11),
            fontsize=7.5,
        )
    axes.set(xlabel="confidence σ(|margin|)", ylabel="share of pairs ordered right", xlim=(0.48, 1.02), ylim=(0, 1.05))
    return figure


def best_of_n_curve(figures: Mapping[str, Mapping[str, float | None]]) -> Figure | None:
    """Gold against the KL divergence of best of n, log n − (n − 1)/n (Stiennon et al. 2020, appendix G.3)."""
    points = {
        int(name.rpartition("_")[2]): own
        for name, own in figures.items()
        if name.startswith("all.best_of_") and own["value"] is not None
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
    errors = np.array(
        [np.subtract(values, lows), np.subtract(highs, values)]
    )  # a percentile interval need not hold the value
    axes.errorbar(divergences, values, yerr=errors.clip(min=0), marker="o", capsize=3, color=GOLD_COLOUR)
    for n, divergence, value in zip(counts, divergences, values, strict=True):
        axes.annotate(f"n = {n}", (divergence, value), textcoords="offset points", xytext=(6, -11), fontsize=7.5)
    axes.set(xlabel="KL divergence (nats)", ylabel="gold score of the pick")
    return figure


def style_matrix(matrix_IJ: Sequence[Sequence[float]] | None) -> Figure | None:
    """RM-Bench's matrix of styles."""
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


def _table(figures: Mapping[str, Mapping[str, float | None]]) -> str:
    """A row a figure; a p-value where there is one."""
    has_p_value = any("p_value" in own for own in figures.values())
    columns = ["value", "low", "high", *(["p_value"] if has_p_value else [])]
    head = (
        "<tr><th>Figure</th>"
        + "".join(f'<th class="number">{name.replace("_", "-")}</th>' for name in columns)
        + "</tr>"
    )
    rows = [
        "".join(f'<td class="number">{_number(own.get(name))}</td>' for name in columns) for own in figures.values()
    ]
    body = "".join(f"<tr><td>{escape(name)}</td>{cells}</tr>" for name, cells in zip(figures, rows, strict=True))
    return f'<div class="wide"><table>{head}{body}</table></div>'


def _number(value: float | None) -> str:
    return "—" if value is None else f"{value:.4f}"
