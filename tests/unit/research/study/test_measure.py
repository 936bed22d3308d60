"""A run's metrics become a row. The tests work out by hand which steps belong to which epoch, and what is averaged."""

import json
from pathlib import Path

import pytest

from research.study.rows import (
    CURVES,
    HELD_OUT,
    RLOO_CURVES,
    RLOO_EVALUATION,
    TRAINING,
    reward_model_figures,
    rloo_figures,
)
from rm_robust.data.scenarios import SCENARIOS


def write_metrics(run_dir: Path, stage: str, lines: list[dict[str, float]]) -> None:
    rows = [{"stage": stage, "step": step, "time": 0.0, **line} for step, line in enumerate(lines, start=1)]
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def reward_model_line(step: int, *, is_evaluated: bool) -> dict[str, float]:
    """Return a line in which every training metric equals its step, and every held-out metric a hundred times that."""
    held_out = {
        f"reward_model/{s}_{m}": 100.0 * step
        for s in SCENARIOS
        for m in HELD_OUT
        if m != "kendall_tau_b" or s != "in_domain"
    }
    return {f"reward_model/{name}": float(step) for name in TRAINING} | (held_out if is_evaluated else {})


def test_epochs_end_with_their_evaluations_and_the_last_one_with_the_last_step(tmp_path: Path) -> None:
    write_metrics(
        tmp_path, "reward_model", [reward_model_line(step, is_evaluated=step in (3, 6, 9, 10)) for step in range(1, 11)]
    )
    figures, curves = reward_model_figures(tmp_path, num_epochs=3)
    assert [figures[f"{epoch}/in_domain/accuracy"] for epoch in (1, 2, 3)] == [300, 600, 1000]
    assert [figures[f"{epoch}/train/loss"] for epoch in (0, 1, 2, 3)] == [
        1,
        (1 + 2 + 3) / 3,
        (4 + 5 + 6) / 3,
        (7 + 8 + 9 + 10) / 4,
    ]
    assert figures["3/mutual_disjoint/kendall_tau_b"] == 1000
    assert "3/in_domain/kendall_tau_b" not in figures
    assert curves == {name: [float(step) for step in range(1, 11)] for name in CURVES}


def test_a_run_whose_last_epoch_ends_with_its_last_evaluation_is_read_too(tmp_path: Path) -> None:
    write_metrics(
        tmp_path, "reward_model", [reward_model_line(step, is_evaluated=step % 2 == 0) for step in range(1, 7)]
    )
    figures, _ = reward_model_figures(tmp_path, num_epochs=3)
    assert [figures[f"{epoch}/in_domain/accuracy"] for epoch in (1, 2, 3)] == [200, 400, 600]


def test_a_run_that_is_not_evaluated_after_every_epoch_is_no_row(tmp_path: Path) -> None:
    write_metrics(tmp_path, "reward_model", [reward_model_line(step, is_evaluated=step == 6) for step in range(1, 7)])
    with pytest.raises(AssertionError, match="1 evaluations in 3 epochs"):
        reward_model_figures(tmp_path, num_epochs=3)


def test_a_long_run_is_drawn_with_means_of_equal_parts(tmp_path: Path) -> None:
    write_metrics(
        tmp_path, "reward_model", [reward_model_line(step, is_evaluated=step in (48, 72, 96)) for step in range(1, 97)]
    )
    _, curves = reward_model_figures(tmp_path, num_epochs=3)
    assert curves["accuracy"] == [4 * part + 2.5 for part in range(24)]


def test_a_policys_halves_are_told_apart_by_its_gold_score(tmp_path: Path) -> None:
    gold = [float(min(step, 20)) for step in range(40)]  # rises in the first half only
    write_metrics(
        tmp_path, "rloo", [dict.fromkeys(RLOO_CURVES, 1.0) | {"rloo/gold_score_mean": value} for value in gold]
    )
    summary = {"rloo": {"last_evaluation": dict.fromkeys(RLOO_EVALUATION, 0.5), "overoptimised_steps": [7, 8]}}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    figures, curves = rloo_figures(tmp_path)
    middle = (16 + 17 + 18 + 19 + 20 * 4) / 8
    assert figures["gold_rise_first_half"] == pytest.approx(middle - (0 + 1 + 2 + 3) / 4)
    assert figures["gold_rise_second_half"] == pytest.approx(20 - middle)
    assert (figures["gold_score_mean_last"], figures["num_overoptimised_steps"], figures["evaluation_win_rate"]) == (
        20,
        2,
        0.5,
    )
    assert curves["gold_score_mean"] == gold
