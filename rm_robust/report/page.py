"""`report.html`: one self-contained file that shows what a run did. A section per part; a part that has not run says so.

It reads only the run directory, so it can be made again at any time, also for a run that was stopped half-way:

    from rm_robust.report.page import write_report
    write_report(Path("runs/tiny_cpu"))
"""

from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from rm_robust.data.scenarios import SCENARIOS
from rm_robust.report import figures
from rm_robust.report.html import absent, figure_grid, page, picture, section
from rm_robust.report.policy import evaluations_section, monitor_in_short, monitor_sentence
from rm_robust.report.record import RunRecord, Sample, first_and_last_tenth, gold_gain, metric_series, read_run
from rm_robust.runs.metrics import MetricsLine
from rm_robust.runs.storage.commits import write_text_atomic

NUM_SAMPLES_SHOWN = 4
"""Completions shown from the first and from the last recorded RLOO step."""


def write_report(run_dir: Path) -> Path:
    """Make `run_dir/report.html` from the run's own files and return its path. Raises DataError when a file cannot be understood."""
    run = read_run(run_dir)
    parts: list[Callable[[RunRecord], str]] = [
        _summary, _scores_section, _scenarios_section, _reward_model_section, _sft_section, _policy_section, evaluations_section,
        _samples_section, _time_section, _config_section,
    ]  # fmt: skip
    with matplotlib.rc_context(figures.STYLE):
        body = "\n".join(part(run) for part in parts)
    path = run_dir / "report.html"
    write_text_atomic(path, page(f"{run.name}: run report", body))
    return path


def _summary(run: RunRecord) -> str:
    facts = [
        ("Run", run.name),
        ("Config", str(run.config.get("name", "not recorded"))),
        ("Objective", str(run.config.get("reward_model.objective", "not recorded"))),
        (
            "Seeds",
            ", ".join(f"{key} {value}" for key, value in run.config.items() if key.split(".")[-1] == "seed")
            or "not recorded",
        ),
    ]
    for label, key in (("Proxy score", "rloo/proxy_score_mean"), ("Gold score", "rloo/gold_score_mean")):
        values = metric_series(run.metrics["rloo"], key).values
        if len(values):
            first, last = (tenth.mean() for tenth in first_and_last_tenth(values))
            facts.append(
                (f"{label}, first → last tenth of {len(values)} scored RLOO steps", f"{first:.3f} → {last:.3f}")
            )
        else:
            facts.append((label, "RLOO has not run" if not run.metrics["rloo"] else "not logged"))
    gain = gold_gain(run.metrics["rloo"])
    if gain is not None:
        facts.append(("Gold gain, in standard deviations of the first tenth's completions", f"{gain:+.2f} SD"))
    if run.metrics["rloo"]:
        facts.append(("Over-optimisation monitor", monitor_in_short(run)))
    for name, result in run.evaluation.items():
        facts.append((f"{figures.scenario_label(name)}, {figures.metric_label(result.metric)}", f"{result.value:.3f}"))
    items = "".join(f"<div><dt>{escape(term)}</dt><dd>{escape(fact)}</dd></div>" for term, fact in facts)
    return f'<h1>{escape(run.name)}</h1>\n<div class="summary"><dl>{items}</dl><p>{escape(_verdict(run))}</p></div>'


def _verdict(run: RunRecord) -> str:
    """One sentence on proxy against gold, the question that the run exists for."""
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


def _scores_section(run: RunRecord) -> str:
    lines = run.metrics["rloo"]
    if not lines:
        return section("Proxy and gold score", absent("RLOO has not run: metrics.jsonl has no line of stage rloo."))
    notes = [monitor_sentence(run)]
    if run.response_models is None:
        notes.append(
            absent("No response-model levels: world/response_models.json is only written for the embedded world.")
        )
    by_step = picture(
        "Against RLOO step",
        figures.scores_by_step(lines, run.response_models),
        "Dots are steps, the thick line is their moving mean. Healthy: both rise, and gold climbs from the SFT policy's level towards the "
        "ceiling, the best response model. Over-optimisation: the proxy keeps rising while gold turns flat or falls; a red line ends a window "
        "that the monitor calls over-optimised.",
        "neither the proxy nor the gold score was logged",
    )
    by_kl = picture(
        "Against KL divergence",
        figures.scores_by_kl(lines),
        "The same steps against the distance from the SFT policy, coloured from the first (dark) to the last (light), with their moving "
        "mean. A good reward model buys gold score with every nat; where gold bends down while the proxy still climbs, the extra KL is "
        "spent on the proxy's errors. Red rings are the steps that have a red line in the other picture.",
        "rloo/kl_mean was not logged together with a score",
    )
    return section("Proxy and gold score", *notes, figure_grid(by_step, by_kl))


def _scenarios_section(run: RunRecord) -> str:
    parts = [_scenario_table(run)]
    pictures = []
    if run.evaluation:
        pictures.append(
            picture(
                "The four scenarios",
                figures.scenario_bars(run.evaluation, run.bt_twin.evaluation if run.bt_twin else {}),
                "Longer is better; the dashes mark what guessing scores. Accuracy and tau-b are different scales: compare tau-b bars with "
                "each other. The less a bar loses towards mutual-disjoint, the better the reward model carries over to responses and "
                "prompts unlike its training data.",
                "no scenario was evaluated",
            )
        )
    if not run.scores:
        parts.append(absent("No score or hidden-norm histograms: evaluation/scores.parquet has not been written."))
    else:
        pictures += [
            picture(
                "Scores",
                figures.score_histograms(run.scores),
                "All four should lie over each other, centred near 0 when trained with BSR. A shift or a wider spread on the disjoint sets "
                "means that raw scores are not comparable between familiar and unfamiliar responses."
                + _num_dropped(run),
                "no finite score was recorded",
            ),
            picture(
                "Hidden norms",
                figures.hidden_norm_histograms(run.scores),
                "The paper's explanation of over-optimisation: training spreads the norm of the scored hidden state, and more so on unseen "
                "responses. The two colours should coincide. After the final norm the spread is small by construction (the norm rescales "
                "each state), so look at the upper panel first.",
                "no hidden norm was recorded",
            ),
            picture(
                "Dispersion of hidden norms",
                figures.norm_dispersion(run),
                "Standard deviation of the hidden norm before the final norm, as a fraction of its mean. The paper's claim: Bradley-Terry widens it, BSR "
                "less so, most of all on unseen responses."
                + ("" if run.bt_twin else " This run trained no Bradley-Terry twin (reward_model.bt_twin)."),
                "no hidden norm was logged in training",
            ),
        ]
    return section("Reward model: the four scenarios", *parts, figure_grid(*pictures))


def _scenario_table(run: RunRecord) -> str:
    if not run.evaluation:
        return absent("The reward model has not been evaluated: there is no evaluation.json.")
    rows = []
    twin = run.bt_twin.evaluation if run.bt_twin else {}
    for name, result in run.evaluation.items():
        of_twin = ([f"{twin[name].value:.4f}"] if name in twin else ["-"]) if run.bt_twin else []
        numbers = (
            f"{result.value:.4f}",
            *of_twin,
            str(result.num_prompts),
            str(result.num_undefined),
            str(result.num_constant_scores),
        )
        cells = "".join(f'<td class="number">{escape(number)}</td>' for number in numbers)
        rows.append(
            f"<tr><td>{escape(figures.scenario_label(name))}</td><td>{escape(figures.metric_label(result.metric))}</td>{cells}</tr>"
        )
    values = (
        [f"Value, {run.config.get('reward_model.objective', 'this run')}", "Value, bt twin"]
        if run.bt_twin
        else ["Value"]
    )
    titles = (*values, "Prompts", "Undefined", "Constant scores")
    head = "".join(f'<th class="number">{escape(title)}</th>' for title in titles)
    table = f'<div class="wide"><table><tr><th>Scenario</th><th>Metric</th>{head}</tr>{"".join(rows)}</table></div>'
    missing = [figures.scenario_label(name) for name in SCENARIOS if name not in run.evaluation]
    note = absent(f"Not evaluated: {', '.join(missing)}.") if missing else ""
    legend = (
        "<p>Undefined: prompts whose gold scores are all equal, left out of the mean. Constant scores: prompts on which the reward model "
        "gives every completion the same score, counted as tau 0 (a tied pair counts as wrong).</p>"
    )
    if run.bt_twin:
        legend += (
            "<p>Bt twin: the Bradley-Terry objective from the same weights on the same batches in the same order.</p>"
        )
    if {result.metric for result in run.evaluation.values()} == {"accuracy"} and len(run.evaluation) > 1:
        legend += "<p>This source has only pairs, no ranked completions: every scenario reports pairwise accuracy.</p>"
    limit = run.config.get("evaluation.max_prompts_per_scenario")
    limited = (
        f"<p>Evaluated on the first {escape(str(limit))} prompts of each scenario at most.</p>"
        if limit is not None
        else ""
    )
    return table + note + legend + limited


def _reward_model_section(run: RunRecord) -> str:
    caption = (
        "Loss falls and accuracy climbs above the dashed 0.5 of guessing; held-out accuracy below training accuracy is the generalisation "
        "gap. The margin grows from 0. With BSR the batch mean stays at the dashed 0 while the spread grows; with BT it may drift. A "
        "spread of hidden norms that keeps growing is what the paper blames for over-optimisation."
    )
    return _curves_section(
        run,
        "reward_model",
        "Reward-model training",
        figures.reward_model_curves,
        (caption, figures.REWARD_MODEL_PANELS),
    )


def _sft_section(run: RunRecord) -> str:
    caption = (
        "Both curves fall and flatten. Held-out loss that turns upwards while training loss falls means the policy memorises its "
        "demonstrations; a curve still falling steeply at the end means that more steps would help."
    )
    return _curves_section(run, "sft", "Supervised fine-tuning", figures.sft_curves, (caption, figures.SFT_PANELS))


def _policy_section(run: RunRecord) -> str:
    caption = (
        "Entropy falls slowly; a drop to 0 means that the policy has collapsed onto one answer. Length should not run away: growing length "
        "with a growing proxy score is the commonest way to fool a reward model. Truncated completions should stay rare."
    )
    return _curves_section(run, "rloo", "RLOO policy", figures.policy_curves, (caption, figures.POLICY_PANELS))


def _curves_section(
    run: RunRecord,
    stage: str,
    title: str,
    draw: Callable[[list[MetricsLine]], Figure | None],
    described: tuple[str, Sequence[figures.Panel]],
) -> str:
    caption, panels = described
    lines = run.metrics[stage]
    if not lines:
        words = {
            "sft": "SFT has not run",
            "reward_model": "Reward-model training has not run",
            "rloo": "RLOO has not run",
        }[stage]
        return section(title, absent(f"{words}: metrics.jsonl has no line of stage {stage}."))
    logged = {key for line in lines for key in line}
    missing = [key for panel in panels for key, _ in panel.curves if key not in logged]
    note = f" Not logged in this run: {', '.join(missing)}." if missing else ""
    return section(
        title, picture(f"{title}: curves", draw(lines), caption + note, f"none of its metrics was logged.{note}")
    )


def _samples_section(run: RunRecord) -> str:
    title = "RLOO: sampled completions"
    if not run.samples:
        return section(title, absent("No completions to show: rloo/samples.jsonl has not been written."))
    first_step, last_step = run.samples[0].step, run.samples[-1].step
    parts = []
    for step in dict.fromkeys((first_step, last_step)):
        samples = [sample for sample in run.samples if sample.step == step][:NUM_SAMPLES_SHOWN]
        parts.append(f"<h3>Step {step}</h3>{_sample_table(samples)}")
    text = "<p>Read whether the completions got better, or only longer, more flattering or more repetitive while the proxy score rose.</p>"
    return section(title, text, *parts)


def _sample_table(samples: list[Sample]) -> str:
    rows = []
    for sample in samples:
        scores = [
            "not scored" if score is None else f"{score:.3f}" for score in (sample.proxy_score, sample.gold_score)
        ]
        numbers = "".join(f'<td class="number">{text}</td>' for text in (*scores, str(sample.num_tokens)))
        rows.append(
            f'<tr><td class="text">{escape(sample.prompt)}</td><td class="text">{escape(sample.completion)}</td>{numbers}</tr>'
        )
    head = (
        "<tr><th>Prompt</th><th>Completion</th>"
        + "".join(f'<th class="number">{t}</th>' for t in ("Proxy", "Gold", "Tokens"))
        + "</tr>"
    )
    return f'<div class="wide"><table>{head}{"".join(rows)}</table></div>'


def _time_section(run: RunRecord) -> str:
    stage_seconds = run.all_stage_seconds
    stages = picture(
        "Stages of the run",
        figures.stage_times(stage_seconds),
        f"{sum(stage_seconds.values()):.0f} s in all. Each bar begins where the one before it ended; the longest is where to save.",
        "no stage has been committed (stages/*.json)",
    )
    steps = picture(
        "One RLOO step",
        figures.step_times(run.metrics["rloo"]),
        "Mean over all steps. Scoring (hatched) runs beside the log-probability pass; only the wait for it adds to the step. A long wait "
        "points at the scoring service, a long sync at the network.",
        "RLOO has not run, or logged no times",
    )
    return section("Where the time went", figure_grid(stages, steps))


def _config_section(run: RunRecord) -> str:
    if not run.config:
        return section("Config", absent("There is no config.resolved.json in the run directory."))
    rows = "".join(
        f"<tr><td><code>{escape(key)}</code></td><td>{escape(str(value))}</td></tr>"
        for key, value in run.config.items()
    )
    return section(
        "Config",
        f'<details><summary>{len(run.config)} resolved values</summary><div class="wide"><table>{rows}</table></div></details>',
    )


def _num_dropped(run: RunRecord) -> str:
    num_dropped = sum(int((part.scores != part.scores).sum()) for part in run.scores.values())
    return f" {num_dropped} completions without a score are not drawn." if num_dropped else ""
