"""The summary of a run, for summary.json and the terminal.

It has the scenario table, the first and last proxy and gold scores, and where the report is.
"""

import json
from pathlib import Path
from typing import Any

from rm_robust.report.page import write_report
from rm_robust.report.record import (
    RunRecord,
    first_and_last_tenth,
    gold_gain,
    judged_steps,
    metric_series,
    policy_evaluations,
    read_run,
)
from rm_robust.runs import files as run_files
from rm_robust.runs.layout import RunLayout


def write_summary(run_dir: Path) -> dict[str, Any]:
    """Write report.html and summary.json from the run's own files, and return the summary."""
    run = read_run(run_dir)
    report_path = write_report(run_dir)
    summary = {
        "name": run.name,
        "scenarios": {
            name: {"metric": result.metric, "value": result.value, "num_prompts": result.num_prompts}
            for name, result in run.evaluation.items()
        },
        "rloo": _rloo_summary(run),
        "response_models": None
        if run.response_models is None
        else {"training": run.response_models.training, "unseen": run.response_models.unseen},
        "bt_twin": None
        if run.bt_twin is None
        else {
            name: {"metric": result.metric, "value": result.value} for name, result in run.bt_twin.evaluation.items()
        },
        "stage_seconds": run.all_stage_seconds,
        "report": run_files.shown(report_path),
    }
    run_files.write_json(RunLayout(run_dir).summary, summary)
    return summary


def read_summary(run_dir: Path) -> dict[str, Any]:
    """Return what write_summary wrote."""
    summary: dict[str, Any] = json.loads(RunLayout(run_dir).summary.read_text())
    return summary


def summary_lines(summary: dict[str, Any]) -> list[str]:
    """Return the lines that a pipeline prints last."""
    twin = summary["bt_twin"] or {}
    lines = ["scenario            metric          value   prompts" + ("   BT twin" if twin else "")]
    for name, row in summary["scenarios"].items():
        of_twin = f"   {twin[name]['value']:7.4f}" if name in twin else ""
        lines.append(f"{name:19} {row['metric']:14} {row['value']:7.4f}  {row['num_prompts']:7d}{of_twin}")
    rloo = summary["rloo"]
    for key in ("proxy_score", "gold_score"):
        if key in rloo:
            lines.append(
                f"{key}: first tenth of steps {rloo[key]['first_tenth']:.3f}, last tenth {rloo[key]['last_tenth']:.3f}"
            )
    if rloo.get("gold_gain") is not None:
        lines.append(f"gold gain: {rloo['gold_gain']:.2f} standard deviations of the first tenth's completions")
    if rloo["overoptimised_steps"]:
        steps = rloo["overoptimised_steps"]
        lines.append(
            f"OVER-OPTIMISED at {len(steps)} steps, {steps[0]} the first and {steps[-1]} the last; "
            "the report has the numbers"
        )
    if rloo["last_evaluation"] is not None:
        lines.append(_evaluation_line(rloo["last_evaluation"]))
    lines.append(f"stages: {sum(summary['stage_seconds'].values()):.0f} s in all")
    return [*lines, f"report: {summary['report']}"]


def _evaluation_line(row: dict[str, float]) -> str:
    return (
        f"win rate against the SFT policy by gold after step {row['step']}: {row['win_rate']:.3f} "
        f"(standard error {row['win_rate_se']:.3f}), at equal length {row['length_controlled_win_rate']:.3f}"
    )


def _rloo_summary(run: RunRecord) -> dict[str, Any]:
    lines = run.metrics["rloo"]
    evaluations = policy_evaluations(lines)
    summary: dict[str, Any] = {
        "num_steps": len({line["step"] for line in lines} - {0}),
        "gold_gain": gold_gain(lines),
        "overoptimised_steps": [judged.step for judged in judged_steps(lines) if judged.is_overoptimised],
        "last_evaluation": evaluations[-1] if evaluations else None,
    }
    for key in ("proxy_score", "gold_score"):
        values = metric_series(lines, f"rloo/{key}_mean").values
        if len(values):
            first, last = first_and_last_tenth(values)
            summary[key] = {
                "first_step": float(values[0]),
                "first_tenth": float(first.mean()),
                "last_tenth": float(last.mean()),
                "last_step": float(values[-1]),
            }
    return summary
