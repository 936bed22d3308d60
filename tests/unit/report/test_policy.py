"""The report and the summary show the over-optimisation and the policy's evaluations that a run logged.

The run may log gold scores at every step or at every n-th step.
"""

import json
from html import unescape
from pathlib import Path
from typing import Any

import pytest

from rm_robust.report.page import write_report
from rm_robust.report.policy import EVALUATION_COLUMNS
from rm_robust.report.record import JudgedStep, judged_steps, policy_evaluations, read_run
from rm_robust.report.summary import summary_lines, write_summary

Row = dict[str, Any]
EVALUATION = {
    "gold_mean": 0.81,
    "sft_gold_mean": 0.62,
    "win_rate": 0.655,
    "win_rate_se": 0.021,
    "length_controlled_win_rate": 0.587,
    "completion_tokens_mean": 31.25,
    "sft_completion_tokens_mean": 24.5,
    "kl_mean": 3.456,
}


def judged(proxy_rise: float, gold_rise: float, *, is_over: bool) -> Row:
    return {
        "rloo/monitor/proxy_rise": proxy_rise,
        "rloo/monitor/gold_rise": gold_rise,
        "rloo/overoptimised": float(is_over),
    }


def run_with(run_dir: Path, additions: dict[int, Row], *, num_steps: int = 12, gold_every_steps: int = 1) -> Path:
    """Write a run whose steps have proxy scores and KL, gold scores at every n-th step, and `additions` by step."""
    rows = []
    for step in range(1, num_steps + 1):
        row: Row = {
            "stage": "rloo",
            "step": step,
            "time": 0.0,
            "rloo/proxy_score_mean": 0.1 * step,
            "rloo/proxy_score_std": 1.0,
            "rloo/kl_mean": 0.2 * step,
        }
        if (step - 1) % gold_every_steps == 0:
            row |= {"rloo/gold_score_mean": 0.5 - 0.01 * step, "rloo/gold_score_std": 0.3}
        rows.append(row | additions.get(step, {}))
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return run_dir


def report_of(run_dir: Path) -> str:
    return write_report(run_dir).read_text()


def test_a_run_that_was_over_optimised_opens_with_a_warning_that_has_the_numbers(tmp_path: Path) -> None:
    rises = {
        8: judged(0.2, 0.1, is_over=False),
        9: judged(0.41, -0.12, is_over=True),
        10: judged(0.33, 0.05, is_over=False),
        11: judged(0.3, -0.2, is_over=True),
    }
    text = report_of(run_with(tmp_path, rises))
    section = text[text.index("<h2>Proxy and gold score</h2>") :]
    warning = section[section.index("<p") : section.index("</p>")]
    assert warning.startswith('<p class="warning"')
    for expected in (
        "at 2 of the 4 steps",
        "first is step 9",
        "last step 11",
        "0.41 standard deviations",
        "up to step 9",
        "changed by -0.12",
    ):
        assert expected in warning
    assert "over-optimised at 2 of 4 judged steps, from step 9" in text


def test_a_run_that_was_not_over_optimised_says_so_with_its_largest_proxy_rise(tmp_path: Path) -> None:
    text = report_of(
        run_with(
            tmp_path,
            {
                8: judged(0.2, 0.1, is_over=False),
                9: judged(0.52, 0.31, is_over=False),
                10: judged(0.4, 0.6, is_over=False),
            },
        )
    )
    assert 'class="warning"' not in text
    assert "did not fire at any of the 3 steps that it judged" in text
    assert (
        "was 0.52 standard deviations of the first step's scores, up to step 9; the gold score changed by +0.31"
        in unescape(text)
    )


def test_a_run_too_short_for_the_monitor_says_so(tmp_path: Path) -> None:
    (tmp_path / "config.resolved.json").write_text(json.dumps({"rloo": {"monitor": {"window_steps": 20}}}))
    assert "judged no step: its window of 20 steps with a gold score was never full" in report_of(
        run_with(tmp_path, {})
    )


def test_the_evaluations_are_a_table_row_each(tmp_path: Path) -> None:
    evaluation = {f"rloo/eval/{name}": value for name, value in EVALUATION.items()}
    text = report_of(run_with(tmp_path, {4: evaluation | {"rloo/eval/win_rate": 0.5}, 8: evaluation}))
    assert [name for name, _, _ in EVALUATION_COLUMNS] == list(EVALUATION)
    for cells in (
        ("4", "0.810", "0.620", "0.500"),
        ("8", "0.810", "0.620", "0.655", "0.021", "0.587", "31.2", "24.5", "3.46"),
    ):
        assert "".join(f'<td class="number">{cell}</td>' for cell in cells) in text


def test_a_policy_that_was_never_evaluated_is_said_to_be_so(tmp_path: Path) -> None:
    assert "The policy was not evaluated on held prompts" in report_of(run_with(tmp_path, {}))


@pytest.mark.parametrize("gold_every_steps", [3, 100])
def test_gold_scores_of_every_nth_step_alone_are_drawn_and_summed_up(tmp_path: Path, gold_every_steps: int) -> None:
    run_with(tmp_path, {10: judged(0.4, -0.1, is_over=True)}, gold_every_steps=gold_every_steps)
    summary = write_summary(tmp_path)
    text = (tmp_path / "report.html").read_text()
    num_scored = -(-12 // gold_every_steps)
    assert f"tenth of {num_scored} scored RLOO steps" in text
    assert text.count("<img") == 2
    assert summary["rloo"]["gold_score"]["last_step"] == pytest.approx(
        0.5 - 0.01 * (1 + gold_every_steps * (num_scored - 1))
    )
    assert summary["rloo"]["num_steps"] == 12


def test_the_summary_has_the_over_optimised_steps_and_the_last_evaluation(tmp_path: Path) -> None:
    evaluation = {f"rloo/eval/{name}": value for name, value in EVALUATION.items()}
    additions = {
        4: evaluation | {"rloo/eval/gold_mean": 0.1},
        9: judged(0.4, -0.1, is_over=True),
        10: judged(0.3, 0.2, is_over=False),
        12: evaluation,
    }
    summary = write_summary(run_with(tmp_path, additions))
    assert summary["rloo"]["overoptimised_steps"] == [9]
    assert summary["rloo"]["last_evaluation"] == {"step": 12, **EVALUATION}
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    printed = "\n".join(summary_lines(summary))
    assert "OVER-OPTIMISED at 1 steps, 9 the first and 9 the last" in printed
    assert "after step 12: 0.655 (standard error 0.021), at equal length 0.587" in printed


def test_a_summary_without_monitor_or_evaluation_has_neither(tmp_path: Path) -> None:
    summary = write_summary(run_with(tmp_path, {}))
    assert summary["rloo"]["overoptimised_steps"] == []
    assert summary["rloo"]["last_evaluation"] is None
    assert not [line for line in summary_lines(summary) if "OVER" in line or "win rate" in line]


def test_what_was_logged_is_read_back(tmp_path: Path) -> None:
    additions = {
        3: judged(0.4, -0.1, is_over=True),
        4: {"rloo/eval/gold_mean": 0.2},
        5: judged(0.3, 0.2, is_over=False),
    }
    lines = read_run(run_with(tmp_path, additions)).metrics["rloo"]
    assert judged_steps(lines) == [JudgedStep(3, 0.4, -0.1, True), JudgedStep(5, 0.3, 0.2, False)]
    assert policy_evaluations(lines) == [{"step": 4, "gold_mean": 0.2}]
