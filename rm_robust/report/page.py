"""`report.html`: one self-contained file that shows what a run did. A part that has not run says so.

The report is made from the run directory alone, so it can be made again at any time, also for a run that was stopped
half-way:

    from rm_robust.report.page import write_report
    write_report(Path("runs/tiny_cpu"))

page.html.jinja has the sections and their sentences; this file computes what they show.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib

from rm_robust.config.data import LOST_FRACTION_TO_WARN_OF
from rm_robust.data.scenarios import SCENARIOS
from rm_robust.report import policy_figures, reward_model_figures
from rm_robust.report.figure_style import STYLE, Panel
from rm_robust.report.html import inline_png, render
from rm_robust.report.policy import EVALUATION_HEADS, MonitorFinding, evaluation_rows, monitor_finding
from rm_robust.report.record import (
    RunRecord,
    Sample,
    SourceRows,
    first_and_last_tenth,
    gold_gain,
    metric_series,
    read_run,
)
from rm_robust.report.reward_model_figures import metric_label, scenario_label
from rm_robust.runs import files as run_files
from rm_robust.runs.layout import RunLayout
from rm_robust.runs.metrics import MetricsLine

NUM_SAMPLES_SHOWN = 4
"""The number of completions shown from the first and from the last recorded RLOO step."""


@dataclass(frozen=True)
class ScenarioTable:
    """The table of the four scenarios and what a reader must know of it."""

    number_heads: list[str]
    rows: list[tuple[str, str, list[str]]]
    """The rows as (scenario, metric, numbers)."""
    missing: list[str]
    """The scenarios that were not evaluated."""
    have_only_pairs: bool
    """Whether there are several scenarios and all report accuracy, because the source has no ranked completions."""
    max_prompts: object
    """The limit on the prompts of each scenario, or None."""


def write_report(run_dir: Path) -> Path:
    """Make `run_dir/report.html` from the run's own files and return its path.

    Raises DataError when a file cannot be understood.
    """
    run = read_run(run_dir)
    monitor = monitor_finding(run)
    html = render(
        "report/page.html.jinja",
        title=f"{run.name}: run report",
        run=run,
        facts=_facts(run, monitor),
        verdict=_verdict(run),
        monitor=monitor,
        scenarios=_scenario_table(run),
        source_rows=[_source_row(source) for source in run.sources],
        losses=[source for source in run.sources if source.lost_fraction > LOST_FRACTION_TO_WARN_OF],
        num_without_score=sum(int((part.scores != part.scores).sum()) for part in run.scores.values()),  # NaN != NaN
        pictures=_pictures(run),
        not_logged={
            "reward_model": _not_logged(run.metrics["reward_model"], reward_model_figures.REWARD_MODEL_PANELS),
            "sft": _not_logged(run.metrics["sft"], policy_figures.SFT_PANELS),
            "rloo": _not_logged(run.metrics["rloo"], policy_figures.POLICY_PANELS),
        },
        policy_evaluation_heads=EVALUATION_HEADS,
        policy_evaluations=evaluation_rows(run),
        shown_samples=_shown_samples(run.samples),
    )
    path = RunLayout(run_dir).report
    run_files.write_text(path, html)
    return path


def _pictures(run: RunRecord) -> dict[str, str | None]:
    """Return the pictures by name as inline PNG, None for one that has nothing to show."""
    rloo = run.metrics["rloo"]
    twin = run.bt_twin.evaluation if run.bt_twin else {}
    with matplotlib.rc_context(STYLE):
        return {
            "scores_by_step": inline_png(policy_figures.scores_by_step(rloo, run.response_models)),
            "scores_by_kl": inline_png(policy_figures.scores_by_kl(rloo)),
            "scenario_bars": inline_png(reward_model_figures.scenario_bars(run.evaluation, twin)),
            "score_histograms": inline_png(reward_model_figures.score_histograms(run.scores)),
            "hidden_norm_histograms": inline_png(reward_model_figures.hidden_norm_histograms(run.scores)),
            "norm_dispersion": inline_png(reward_model_figures.norm_dispersion(run)),
            "reward_model": inline_png(reward_model_figures.reward_model_curves(run.metrics["reward_model"])),
            "sft": inline_png(policy_figures.sft_curves(run.metrics["sft"])),
            "rloo": inline_png(policy_figures.policy_curves(rloo)),
            "stage_times": inline_png(policy_figures.stage_times(run.all_stage_seconds)),
            "step_times": inline_png(policy_figures.step_times(rloo)),
        }


def _facts(run: RunRecord, monitor: MonitorFinding) -> list[tuple[str, str]]:
    """Return the terms and values of the summary at the top of the page."""
    seeds = [f"{key} {value}" for key, value in run.config.items() if key.split(".")[-1] == "seed"]
    facts = [
        ("Run", run.name),
        ("Config", str(run.config.get("name", "not recorded"))),
        ("Objective", str(run.config.get("reward_model.objective", "not recorded"))),
        ("Seeds", ", ".join(seeds) or "not recorded"),
    ]
    rloo = run.metrics["rloo"]
    for label, key in (("Proxy score", "rloo/proxy_score_mean"), ("Gold score", "rloo/gold_score_mean")):
        values = metric_series(rloo, key).values
        if len(values):
            first, last = (tenth.mean() for tenth in first_and_last_tenth(values))
            term = f"{label}, first → last tenth of {len(values)} scored RLOO steps"
            facts.append((term, f"{first:.3f} → {last:.3f}"))
        else:
            facts.append((label, "not logged" if rloo else "RLOO has not run"))
    gain = gold_gain(rloo)
    if gain is not None:
        facts.append(("Gold gain, in standard deviations of the first tenth's completions", f"{gain:+.2f} SD"))
    if rloo:
        facts.append(("Over-optimisation monitor", monitor.in_short))
    for name, result in run.evaluation.items():
        facts.append((f"{scenario_label(name)}, {metric_label(result.metric)}", f"{result.value:.3f}"))
    return facts


def _verdict(run: RunRecord) -> str:
    """Return one sentence on proxy against gold, the question that the run exists for."""
    proxy = metric_series(run.metrics["rloo"], "rloo/proxy_score_mean").values
    gain = gold_gain(run.metrics["rloo"])
    if not len(proxy) or gain is None:
        return (
            "Without proxy and gold scores from RLOO this run cannot say whether the reward model was over-optimised."
        )
    first, last = (tenth.mean() for tenth in first_and_last_tenth(proxy))
    proxy_words = "The proxy score rose" if last > first else "The proxy score did not rise"
    if gain > 0.1:
        return (
            f"{proxy_words} and the gold score rose with it."
            if last > first
            else f"{proxy_words}, but the gold score rose."
        )
    gold_words = "fell" if gain < -0.1 else "stayed where it was (within a tenth of a standard deviation)"
    alarm = ": the policy over-optimised the reward model." if last > first else "."
    return f"{proxy_words} while the gold score {gold_words}{alarm}"


def _scenario_table(run: RunRecord) -> ScenarioTable:
    twin = run.bt_twin.evaluation if run.bt_twin else {}
    rows = []
    for name, result in run.evaluation.items():
        values = [f"{result.value:.4f}"]
        if run.bt_twin:
            values.append(f"{twin[name].value:.4f}" if name in twin else "-")
        counts = [str(result.num_prompts), str(result.num_undefined), str(result.num_constant_scores)]
        rows.append((scenario_label(name), metric_label(result.metric), values + counts))
    value_heads = ["Value"]
    if run.bt_twin:
        value_heads = [f"Value, {run.config.get('reward_model.objective', 'this run')}", "Value, bt twin"]
    metrics = [result.metric for result in run.evaluation.values()]
    return ScenarioTable(
        number_heads=[*value_heads, "Prompts", "Undefined", "Constant scores"],
        rows=rows,
        missing=[scenario_label(name) for name in SCENARIOS if name not in run.evaluation],
        have_only_pairs=set(metrics) == {"accuracy"} and len(metrics) > 1,
        max_prompts=run.config.get("evaluation.max_prompts_per_scenario"),
    )


def _source_row(source: SourceRows) -> tuple[str, str, str, list[str]]:
    """Return a source's scenario, its paths, what was dropped or skipped and why, and its numbers."""
    reasons = [f"{num} {reason}" for reason, num in source.num_dropped.items()]
    skipped = [f"{num} files not read: {reason}" for reason, num in source.num_skipped_files.items()]
    numbers = [str(source.num_read), str(source.num_kept), str(source.num_truncated), f"{source.lost_fraction:.1%}"]
    return source.scenario, ", ".join(source.paths), ", ".join(reasons + skipped), numbers


def _not_logged(lines: list[MetricsLine], panels: Sequence[Panel]) -> str:
    """Return the sentence that names the panels' metrics that no line has, or "" when there are none."""
    logged = {key for line in lines for key in line}
    missing = [key for panel in panels for key, _ in panel.curves if key not in logged]
    return f" Not logged in this run: {', '.join(missing)}." if missing else ""


def _shown_samples(samples: list[Sample]) -> dict[int, list[tuple[str, str, list[str]]]]:
    """Return the first completions of the first and of the last recorded step, by step.

    Each is (prompt, completion, numbers).
    """
    steps = dict.fromkeys((samples[0].step, samples[-1].step)) if samples else {}
    return {
        step: [
            (sample.prompt, sample.completion, _sample_numbers(sample)) for sample in samples if sample.step == step
        ][:NUM_SAMPLES_SHOWN]
        for step in steps
    }


def _sample_numbers(sample: Sample) -> list[str]:
    scores = (sample.proxy_score, sample.gold_score)
    return ["not scored" if score is None else f"{score:.3f}" for score in scores] + [str(sample.num_tokens)]
