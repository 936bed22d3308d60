"""What the report says of the policy: was it over-optimised, and is it better than the SFT policy. From what the run logged, nothing computed again."""

from html import escape

from rm_robust.report.html import absent, section, warning
from rm_robust.report.record import JudgedStep, RunRecord, judged_steps, policy_evaluations

EVALUATION_COLUMNS = (
    ("gold_mean", "Gold, policy", ".3f"),
    ("sft_gold_mean", "Gold, SFT", ".3f"),
    ("win_rate", "Win rate", ".3f"),
    ("win_rate_se", "± SE", ".3f"),
    ("length_controlled_win_rate", "At equal length", ".3f"),
    ("completion_tokens_mean", "Tokens, policy", ".1f"),
    ("sft_completion_tokens_mean", "Tokens, SFT", ".1f"),
    ("kl_mean", "KL (nats)", ".2f"),
)
"""Name of the metric rloo/eval/<name>, column head, number format."""


def monitor_sentence(run: RunRecord) -> str:
    """HTML: a warning with its numbers when the monitor's rule held at any step, else one sentence that it did not."""
    judged = judged_steps(run.metrics["rloo"])
    if not judged:
        return absent(f"The over-optimisation monitor has judged no step: its window of {_window(run)} was never full.")
    over = [step for step in judged if step.is_overoptimised]
    if not over:
        highest = max(judged, key=lambda step: step.proxy_rise)
        sentence = f"The over-optimisation monitor did not fire at any of the {len(judged)} steps that it judged. {_rises('largest', highest)}"
        return f"<p>{escape(sentence)}</p>"
    return warning(
        f"Over-optimisation: at {len(over)} of the {len(judged)} steps that the monitor judged (the first is step {over[0].step}, the last step "
        f"{over[-1].step}) the proxy score had risen and the gold score had not. {_rises('largest such', max(over, key=lambda step: step.proxy_rise))}"
    )


def monitor_in_short(run: RunRecord) -> str:
    """A few words for the summary."""
    judged = judged_steps(run.metrics["rloo"])
    over = [step.step for step in judged if step.is_overoptimised]
    if not judged:
        return "judged no step"
    return (
        f"over-optimised at {len(over)} of {len(judged)} judged steps, from step {over[0]}"
        if over
        else f"did not fire in {len(judged)} judged steps"
    )


def evaluations_section(run: RunRecord) -> str:
    """The policy against the SFT policy on held prompts, a row an evaluation."""
    title = "RLOO: evaluations of the policy"
    if not run.metrics["rloo"]:
        return section(title, absent("RLOO has not run: metrics.jsonl has no line of stage rloo."))
    evaluations = policy_evaluations(run.metrics["rloo"])
    if not evaluations:
        return section(
            title,
            absent(
                "The policy was not evaluated on held prompts: metrics.jsonl has no rloo/eval/gold_mean (rloo.evaluation.every_steps)."
            ),
        )
    text = (
        "<p>Held prompts, answered by the policy and by the SFT policy, judged by gold. Win rate: how often the policy's completion scores higher, "
        "ties half; 0.5 is no better than SFT. At equal length: the same with the effect of the length difference taken out by regression (Dubois et "
        "al. 2024); far below the win rate, the policy wins by writing longer.</p>"
    )
    head = "".join(f'<th class="number">{escape(label)}</th>' for _, label, _ in EVALUATION_COLUMNS)
    rows = "".join(_evaluation_row(row) for row in evaluations)
    return section(
        title, text, f'<div class="wide"><table><tr><th class="number">Step</th>{head}</tr>{rows}</table></div>'
    )


def _evaluation_row(row: dict[str, int | float]) -> str:
    cells = [str(row["step"])] + [
        format(row[name], number_format) if name in row else "-" for name, _, number_format in EVALUATION_COLUMNS
    ]
    return "<tr>" + "".join(f'<td class="number">{cell}</td>' for cell in cells) + "</tr>"


def _rises(which: str, judged: JudgedStep) -> str:
    return (
        f"The {which} rise of the proxy score over a window was {judged.proxy_rise:.2f} standard deviations of the first step's scores, up to step "
        f"{judged.step}; the gold score changed by {judged.gold_rise:+.2f} of its own."
    )


def _window(run: RunRecord) -> str:
    steps = run.config.get("rloo.monitor.window_steps")
    return "steps with a gold score" if steps is None else f"{steps} steps with a gold score"
