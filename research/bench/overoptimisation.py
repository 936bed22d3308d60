"""Draw proxy and gold score against KL for runs side by side, with the steps that the monitor called over-optimised.

    python -m research.bench.overoptimisation runs/tiny_cpu runs/weak --out docs/results/overoptimisation.png

Every dot is one step of RLOO. The title of a column says what the run trained against, from its config and metrics.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import matplotlib
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rm_robust.report.figure_style import GOLD_COLOUR, PROXY_COLOUR, STYLE, moving_mean
from rm_robust.report.policy_figures import ALARM_COLOUR
from rm_robust.report.record import RunRecord, judged_steps, metric_series, read_run

OBJECTIVES = {"bsr": "BSR", "bt": "Bradley-Terry"}
ROWS = (
    ("rloo/proxy_score_mean", "proxy score (no unit)", PROXY_COLOUR),
    ("rloo/gold_score_mean", "gold score (0 to 1)", GOLD_COLOUR),
)
"""The rows of panels, as (metric, label of the y axis, colour)."""
ALARM_LABEL = "the monitor: over-optimised"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dirs", nargs="+", type=Path, metavar="RUN_DIR", help="one column each")
    parser.add_argument("--out", type=Path, required=True, help="PNG file")
    options = parser.parse_args(arguments)
    with matplotlib.rc_context(STYLE):
        picture = scores_by_kl([read_run(run_dir) for run_dir in options.run_dirs])
        picture.savefig(options.out, format="png", dpi=120, metadata={"Software": None})


def scores_by_kl(runs: Sequence[RunRecord]) -> Figure:
    """Draw a column for each run: the proxy score above, the gold score below, on one scale for all runs."""
    figure = Figure(figsize=(4.1 * len(runs), 5.0))
    grid = figure.subplots(len(ROWS), len(runs), sharex="col", sharey="row", squeeze=False)
    for column, run in enumerate(runs):
        for axes, (metric, _, colour) in zip(grid[:, column], ROWS, strict=True):
            _draw(axes, run, metric, colour)
        grid[0, column].set_title(title_of(run))
        grid[-1, column].set_xlabel("KL to the SFT policy (nats per completion)")
    for axes, (_, label, _) in zip(grid[:, 0], ROWS, strict=True):
        axes.set_ylabel(label)
    shown: dict[str, Artist] = {}
    for axes in grid.flat:
        handles, labels = axes.get_legend_handles_labels()
        shown |= {str(label): handle for label, handle in zip(labels, handles, strict=True)}
    labels = sorted(shown, key=lambda label: label == ALARM_LABEL)
    figure.legend([shown[label] for label in labels], labels, loc="outside lower center", ncols=len(labels))
    return figure


def title_of(run: RunRecord) -> str:
    """Return what the policy was trained against, in words."""
    objective = str(run.config["reward_model.objective"])
    coefficient = run.config["rloo.kl_coefficient"]
    cost = f"KL coefficient {coefficient}" if coefficient else "no KL cost"
    num_steps = run.metrics["reward_model"][-1]["step"]
    return f"Against {OBJECTIVES.get(objective, objective)}, {num_steps} steps of training;\n{cost}"


def _draw(axes: Axes, run: RunRecord, metric: str, colour: str) -> None:
    lines = [line for line in run.metrics["rloo"] if metric in line and "rloo/kl_mean" in line]
    kl, score = metric_series(lines, "rloo/kl_mean").values, metric_series(lines, metric).values
    kind = metric.removeprefix("rloo/").partition("_")[0]
    axes.scatter(kl, score, color=colour, alpha=0.45, s=14, label=f"{kind}, a step")
    axes.plot(moving_mean(kl), moving_mean(score), color=colour, linewidth=2, label=f"{kind}, moving mean")
    steps = {judged.step for judged in judged_steps(run.metrics["rloo"]) if judged.is_overoptimised}
    marked = [index for index, line in enumerate(lines) if line["step"] in steps]
    if marked:
        axes.scatter(kl[marked], score[marked], s=46, facecolors="none", edgecolors=ALARM_COLOUR, label=ALARM_LABEL)


if __name__ == "__main__":
    main()
