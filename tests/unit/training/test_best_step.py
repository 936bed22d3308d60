"""The best evaluation and early stopping, against values worked out by hand."""

from pathlib import Path

from rm_robust.runs.metrics import MetricsWriter
from rm_robust.training.loop import BestStep

KEY = "reward_model/in_domain_accuracy"


def recorded(values: dict[int, float], *, patience: int | None) -> BestStep:
    best = BestStep(KEY, patience)
    for step, value in values.items():
        best.record(step, {KEY: value})
    return best


def test_the_first_of_equal_bests_stays() -> None:
    best = BestStep(KEY, None)
    is_new_best = [best.record(step, {KEY: value}) for step, value in ((5, 0.6), (10, 0.7), (15, 0.7), (20, 0.65))]
    assert (is_new_best, best.step) == ([True, True, False, False], 10)


def test_steps_without_an_evaluation_change_nothing() -> None:
    best = recorded({5: 0.6}, patience=1)
    assert not best.record(6, {"reward_model/loss": 0.1})
    assert (best.step, best.is_over) == (5, False)


def test_patience_counts_evaluations_since_the_best() -> None:
    assert not recorded({5: 0.7, 10: 0.6}, patience=2).is_over
    assert recorded({5: 0.7, 10: 0.6, 15: 0.7}, patience=2).is_over
    assert not recorded({5: 0.7, 10: 0.6, 15: 0.71}, patience=2).is_over
    assert not recorded({5: 0.7, 10: 0.6, 15: 0.5}, patience=None).is_over
    assert not recorded({}, patience=1).is_over


def test_a_resumed_run_knows_the_committed_evaluations_and_no_later_ones(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path, "reward_model", resume_step=0) as writer:
        for step, value in ((5, 0.6), (10, 0.7), (15, 0.9)):
            writer.write(step, {KEY: value})
    best = BestStep(KEY, None)
    best.resume(tmp_path, "reward_model", first_step=10)
    assert best.values == {5: 0.6, 10: 0.7}
