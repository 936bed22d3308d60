"""What the report says of the policy: whether it was over-optimised, and whether it is better than the SFT policy.

Everything comes from what the run logged; nothing is computed again.
"""

from dataclasses import dataclass

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
"""The columns of the table of evaluations, as (<name> of the metric rloo/eval/<name>, column head, number format)."""
EVALUATION_HEADS = ["Step", *(head for _, head, _ in EVALUATION_COLUMNS)]


@dataclass(frozen=True)
class MonitorFinding:
    """What the over-optimisation monitor found in a run, in words."""

    num_judged: int
    is_alarm: bool
    """Whether the monitor's rule held at any step."""
    sentence: str
    in_short: str
    """A few words for the summary."""


def monitor_finding(run: RunRecord) -> MonitorFinding:
    """Return what the monitor logged: at how many of the steps that it judged its rule held, and the largest rise."""
    judged = judged_steps(run.metrics["rloo"])
    overoptimised = [step for step in judged if step.is_overoptimised]
    if not judged:
        return MonitorFinding(
            0,
            False,
            f"The over-optimisation monitor has judged no step: its window of {_window(run)} was never full.",
            "judged no step",
        )
    largest = max(overoptimised or judged, key=lambda step: step.proxy_rise)
    if not overoptimised:
        return MonitorFinding(
            len(judged),
            False,
            f"The over-optimisation monitor did not fire at any of the {len(judged)} steps that it judged. "
            + _rises("largest", largest),
            f"did not fire in {len(judged)} judged steps",
        )
    return MonitorFinding(
        len(judged),
        True,
        f"Over-optimisation: at {len(overoptimised)} of the {len(judged)} steps that the monitor judged (the first is "
        f"step {overoptimised[0].step}, the last step {overoptimised[-1].step}) the proxy score had risen and the gold "
        "score had not. " + _rises("largest such", largest),
        f"over-optimised at {len(overoptimised)} of {len(judged)} judged steps, from step {overoptimised[0].step}",
    )


def evaluation_rows(run: RunRecord) -> list[list[str]]:
    """Return the evaluations of the policy on held-out prompts, one row each, with a cell for each head."""
    return [
        [str(evaluation["step"])]
        + [
            format(evaluation[name], number_format) if name in evaluation else "-"
            for name, _, number_format in EVALUATION_COLUMNS
        ]
        for evaluation in policy_evaluations(run.metrics["rloo"])
    ]


def _rises(which: str, judged: JudgedStep) -> str:
    return (
        f"The {which} rise of the proxy score over a window was {judged.proxy_rise:.2f} standard deviations of the "
        f"first step's scores, up to step {judged.step}; the gold score changed by {judged.gold_rise:+.2f} of its own."
    )


def _window(run: RunRecord) -> str:
    steps = run.config.get("rloo.monitor.window_steps")
    return "steps with a gold score" if steps is None else f"{steps} steps with a gold score"
