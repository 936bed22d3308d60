"""`report.html`: one self-contained file that shows what a run did. A section per part; a part that has not run says so.

It reads only the run directory, so it can be made again at any time, also for a run that was stopped half-way:

    from rm_robust.report import write_report
    write_report(Path("runs/tiny_cpu"))
"""

import base64
import io
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from rm_robust import report_figures as figures
from rm_robust.run_record import SCENARIOS, RunRecord, Sample, first_and_last_tenth, gold_gain, metric_series, read_run
from rm_robust.tracking import MetricsLine, write_text_atomic

NUM_SAMPLES_SHOWN = 4
"""Completions shown from the first and from the last recorded RLOO step."""

PAGE_STYLE = """
:root{color-scheme:light}
*{box-sizing:border-box}
body{margin:0 auto;max-width:74rem;padding:1rem;font:16px/1.5 system-ui,sans-serif;color:#1f2933;background:#fff}
h1{font-size:1.5rem;margin:.2rem 0}h2{font-size:1.2rem;margin:2.2rem 0 .4rem;border-top:2px solid #e4e7eb;padding-top:1rem}
h3{font-size:1rem;margin:.2rem 0}p{margin:.4rem 0;max-width:46rem}
.summary{background:#f5f7fa;border:1px solid #cbd2d9;border-radius:.5rem;padding:.6rem 1rem}
.summary dl{display:grid;grid-template-columns:repeat(auto-fit,minmax(14rem,1fr));gap:.1rem 1.4rem;margin:.4rem 0}
.summary dt{color:#52606d;font-size:.85rem}.summary dd{margin:0 0 .4rem;font-weight:600;overflow-wrap:anywhere}
.absent{color:#7b4a00;background:#fff8e6;border-left:4px solid #e0a800;padding:.4rem .7rem}
.figures{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,30rem),1fr));gap:1rem 2rem;align-items:start}
figure{margin:.6rem 0;max-width:36rem}img{width:100%;height:auto;display:block}
figcaption{font-size:.88rem;color:#3e4c59;margin-top:.3rem}
.wide{overflow-x:auto}table{border-collapse:collapse;font-size:.9rem}
th,td{padding:.3rem .7rem .3rem 0;text-align:left;vertical-align:top;border-bottom:1px solid #e4e7eb}
td.number,th.number{text-align:right;font-variant-numeric:tabular-nums}
td.text{white-space:pre-wrap;overflow-wrap:anywhere;min-width:12rem;max-width:32rem}
summary{cursor:pointer}code{font-size:.88em}
"""


def write_report(run_dir: Path) -> Path:
    """Make `run_dir/report.html` from the run's own files and return its path. Raises DataError when a file cannot be understood."""
    run = read_run(run_dir)
    sections: list[Callable[[RunRecord], str]] = [
        _summary, _scores_section, _scenarios_section, _reward_model_section, _sft_section, _policy_section, _samples_section,
        _time_section, _config_section,
    ]  # fmt: skip
    with matplotlib.rc_context(figures.STYLE):
        body = "\n".join(section(run) for section in sections)
    page = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(run.name)}: run report</title><style>{PAGE_STYLE}</style></head>\n<body>\n{body}\n</body></html>\n"
    )
    path = run_dir / "report.html"
    write_text_atomic(path, page)
    return path


def _summary(run: RunRecord) -> str:
    facts = [
        ("Run", run.name),
        ("Config", str(run.config.get("name", "not recorded"))),
        ("Objective", str(run.config.get("reward_model.objective", "not recorded"))),
        ("Seeds", ", ".join(f"{key} {value}" for key, value in run.config.items() if key.split(".")[-1] == "seed") or "not recorded"),
    ]
    for label, key in (("Proxy score", "rloo/proxy_score_mean"), ("Gold score", "rloo/gold_score_mean")):
        values = metric_series(run.metrics["rloo"], key).values
        if len(values):
            first, last = (tenth.mean() for tenth in first_and_last_tenth(values))
            facts.append((f"{label}, first → last tenth of {len(values)} RLOO steps", f"{first:.3f} → {last:.3f}"))
        else:
            facts.append((label, "RLOO has not run" if not run.metrics["rloo"] else "not logged"))
    gain = gold_gain(run.metrics["rloo"])
    if gain is not None:
        facts.append(("Gold gain, in standard deviations of the first tenth's completions", f"{gain:+.2f} SD"))
    for name, result in run.evaluation.items():
        facts.append((f"{figures.scenario_label(name)}, {figures.metric_label(result.metric)}", f"{result.value:.3f}"))
    items = "".join(f"<div><dt>{escape(term)}</dt><dd>{escape(fact)}</dd></div>" for term, fact in facts)
    return f'<h1>{escape(run.name)}</h1>\n<div class="summary"><dl>{items}</dl><p>{escape(_verdict(run))}</p></div>'


def _verdict(run: RunRecord) -> str:
    """One sentence on proxy against gold, the question that the run exists for."""
    proxy = metric_series(run.metrics["rloo"], "rloo/proxy_score_mean").values
    gain = gold_gain(run.metrics["rloo"])
    if not len(proxy) or gain is None:
        return "Without proxy and gold scores from RLOO this run cannot say whether the reward model was over-optimised."
    first, last = (tenth.mean() for tenth in first_and_last_tenth(proxy))
    proxy_words = "The proxy score rose" if last > first else "The proxy score did not rise"
    if gain > 0.1:
        return f"{proxy_words} and the gold score rose with it." if last > first else f"{proxy_words}, but the gold score rose."
    gold_words = "fell" if gain < -0.1 else "stayed where it was (within a tenth of a standard deviation)"
    alarm = ": the policy over-optimised the reward model." if last > first else "."
    return f"{proxy_words} while the gold score {gold_words}{alarm}"


def _scores_section(run: RunRecord) -> str:
    lines = run.metrics["rloo"]
    if not lines:
        return _section("Proxy and gold score", _absent("RLOO has not run: metrics.jsonl has no line of stage rloo."))
    notes = []
    if run.response_models is None:
        notes.append(_absent("No response-model levels: world/response_models.json is only written for the embedded world."))
    by_step = _figure(
        "Against RLOO step",
        figures.scores_by_step(lines, run.response_models),
        "Dots are steps, the thick line is their moving mean. Healthy: both rise, and gold climbs from the SFT policy's level towards the "
        "ceiling, the best response model. Over-optimisation: the proxy keeps rising while gold turns flat or falls.",
        "neither the proxy nor the gold score was logged",
    )
    by_kl = _figure(
        "Against KL divergence",
        figures.scores_by_kl(lines),
        "The same steps against the distance from the SFT policy, coloured from the first (dark) to the last (light), with their moving mean. A good reward model "
        "buys gold score with every nat; where gold bends down while the proxy still climbs, the extra KL is spent on the proxy's errors.",
        "rloo/kl_mean was not logged together with a score",
    )
    return _section("Proxy and gold score", *notes, _figure_grid(by_step, by_kl))


def _scenarios_section(run: RunRecord) -> str:
    parts = [_scenario_table(run)]
    pictures = []
    if run.evaluation:
        pictures.append(
            _figure(
                "The four scenarios",
                figures.scenario_bars(run.evaluation),
                "Longer is better; the dashes mark what guessing scores. Accuracy and tau-b are different scales: compare tau-b bars with "
                "each other. The fewer a bar loses towards mutual-disjoint, the better the reward model carries over to responses and "
                "prompts unlike its training data.",
                "no scenario was evaluated",
            )
        )
    if not run.scores:
        parts.append(_absent("No score or hidden-norm histograms: evaluation/scores.parquet has not been written."))
    else:
        pictures += [
            _figure(
                "Scores",
                figures.score_histograms(run.scores),
                "All four should lie over each other, centred near 0 when trained with BSR. A shift or a wider spread on the disjoint sets "
                "means that raw scores are not comparable between familiar and unfamiliar responses." + _num_dropped(run),
                "no finite score was recorded",
            ),
            _figure(
                "Hidden norms",
                figures.hidden_norm_histograms(run.scores),
                "The paper's explanation of over-optimisation: training spreads the norm of the scored hidden state, and more so on unseen "
                "responses. The two colours should coincide. After the final norm the spread is small by construction (the norm rescales "
                "each state), so look at the upper panel first.",
                "no hidden norm was recorded",
            ),
        ]
    return _section("Reward model: the four scenarios", *parts, _figure_grid(*pictures))


def _scenario_table(run: RunRecord) -> str:
    if not run.evaluation:
        return _absent("The reward model has not been evaluated: there is no evaluation.json.")
    rows = []
    for name, result in run.evaluation.items():
        numbers = (f"{result.value:.4f}", str(result.num_prompts), str(result.num_undefined), str(result.num_constant_scores))
        cells = "".join(f'<td class="number">{escape(number)}</td>' for number in numbers)
        rows.append(f"<tr><td>{escape(figures.scenario_label(name))}</td><td>{escape(figures.metric_label(result.metric))}</td>{cells}</tr>")
    head = "".join(f'<th class="number">{title}</th>' for title in ("Value", "Prompts", "Undefined", "Constant scores"))
    table = f'<div class="wide"><table><tr><th>Scenario</th><th>Metric</th>{head}</tr>{"".join(rows)}</table></div>'
    missing = [figures.scenario_label(name) for name in SCENARIOS if name not in run.evaluation]
    note = _absent(f"Not evaluated: {', '.join(missing)}.") if missing else ""
    legend = (
        "<p>Undefined: prompts whose gold scores are all equal, left out of the mean. Constant scores: prompts on which the reward model "
        "gives every completion the same score, counted as tau 0 (a tied pair counts as wrong).</p>"
    )
    limit = run.config.get("evaluation.max_prompts_per_scenario")
    limited = f"<p>Evaluated on the first {escape(str(limit))} prompts of each scenario at most.</p>" if limit is not None else ""
    return table + note + legend + limited


def _reward_model_section(run: RunRecord) -> str:
    caption = (
        "Loss falls and accuracy climbs above the dashed 0.5 of guessing; held-out accuracy below training accuracy is the generalisation "
        "gap. The margin grows from 0. With BSR the batch mean stays at the dashed 0 while the spread grows; with BT it may drift. A spread "
        "of hidden norms that keeps growing is what the paper blames for over-optimisation."
    )
    return _curves_section(run, "reward_model", "Reward model: training", figures.reward_model_curves, (caption, figures.REWARD_MODEL_PANELS))


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
    return _curves_section(run, "rloo", "RLOO: the policy", figures.policy_curves, (caption, figures.POLICY_PANELS))


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
        words = {"sft": "SFT has not run", "reward_model": "Reward-model training has not run", "rloo": "RLOO has not run"}[stage]
        return _section(title, _absent(f"{words}: metrics.jsonl has no line of stage {stage}."))
    logged = {key for line in lines for key in line}
    missing = [key for panel in panels for key, _ in panel.curves if key not in logged]
    note = f" Not logged in this run: {', '.join(missing)}." if missing else ""
    return _section(title, _figure("Training curves", draw(lines), caption + note, f"none of its metrics was logged.{note}"))


def _samples_section(run: RunRecord) -> str:
    title = "RLOO: sampled completions"
    if not run.samples:
        return _section(title, _absent("No completions to show: rloo/samples.jsonl has not been written."))
    first_step, last_step = run.samples[0].step, run.samples[-1].step
    parts = []
    for step in dict.fromkeys((first_step, last_step)):
        samples = [sample for sample in run.samples if sample.step == step][:NUM_SAMPLES_SHOWN]
        parts.append(f"<h3>Step {step}</h3>{_sample_table(samples)}")
    text = "<p>Read whether the completions got better, or only longer, more flattering or more repetitive while the proxy score rose.</p>"
    return _section(title, text, *parts)


def _sample_table(samples: list[Sample]) -> str:
    rows = []
    for sample in samples:
        gold = "not scored" if sample.gold_score is None else f"{sample.gold_score:.3f}"
        numbers = "".join(f'<td class="number">{text}</td>' for text in (f"{sample.proxy_score:.3f}", gold, str(sample.num_tokens)))
        rows.append(f'<tr><td class="text">{escape(sample.prompt)}</td><td class="text">{escape(sample.completion)}</td>{numbers}</tr>')
    head = "<tr><th>Prompt</th><th>Completion</th>" + "".join(f'<th class="number">{t}</th>' for t in ("Proxy", "Gold", "Tokens")) + "</tr>"
    return f'<div class="wide"><table>{head}{"".join(rows)}</table></div>'


def _time_section(run: RunRecord) -> str:
    stages = _figure(
        "Stages of the run",
        figures.stage_times(run.stage_seconds),
        f"{sum(run.stage_seconds.values()):.0f} s in all. Each bar begins where the stage before it ended; the longest bar is where to save.",
        "no stage has been committed (stages/*.json)",
    )
    steps = _figure(
        "One RLOO step",
        figures.step_times(run.metrics["rloo"]),
        "Mean over all steps. Generation usually dominates; scoring or weight sync that rivals it points at the server or the network.",
        "RLOO has not run, or logged no times",
    )
    return _section("Where the time went", _figure_grid(stages, steps))


def _config_section(run: RunRecord) -> str:
    if not run.config:
        return _section("Config", _absent("There is no config.resolved.json in the run directory."))
    rows = "".join(f"<tr><td><code>{escape(key)}</code></td><td>{escape(str(value))}</td></tr>" for key, value in run.config.items())
    return _section("Config", f'<details><summary>{len(run.config)} resolved values</summary><div class="wide"><table>{rows}</table></div></details>')


def _num_dropped(run: RunRecord) -> str:
    num_dropped = sum(int((part.scores != part.scores).sum()) for part in run.scores.values())
    return f" {num_dropped} completions without a score are not drawn." if num_dropped else ""


def _section(title: str, *parts: str) -> str:
    return f"<h2>{escape(title)}</h2>\n" + "\n".join(part for part in parts if part)


def _absent(sentence: str) -> str:
    return f'<p class="absent">{escape(sentence)}</p>'


def _figure_grid(*html: str) -> str:
    return f'<div class="figures">{"".join(html)}</div>' if html else ""


def _figure(title: str, figure: Figure | None, caption: str, reason_absent: str) -> str:
    """The figure as an inline PNG with its caption, or a sentence that says why there is none."""
    if figure is None:
        return f"<div><h3>{escape(title)}</h3>{_absent(f'No picture: {reason_absent}.'.replace('..', '.'))}</div>"
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=160)
    image = base64.b64encode(buffer.getvalue()).decode("ascii")
    picture = f'<img alt="{escape(title)}" src="data:image/png;base64,{image}">'
    return f"<figure><h3>{escape(title)}</h3>{picture}<figcaption>{escape(caption)}</figcaption></figure>"
