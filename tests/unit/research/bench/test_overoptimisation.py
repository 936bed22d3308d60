"""The picture of proxy and gold score against KL, from the metrics of made-up runs."""

import json
from pathlib import Path

from research.bench.overoptimisation import ALARM_LABEL, main, scores_by_kl, title_of
from rm_robust.report.record import read_run


def run_with(run_dir: Path, *, objective: str, kl_coefficient: float, overoptimised: set[int]) -> Path:
    """Write a run of four RLOO steps, of which the monitor judged all but the first."""
    rows: list[dict[str, str | int | float]] = [{"stage": "reward_model", "step": 7, "time": 0.0}]
    for step in range(1, 5):
        row: dict[str, str | int | float] = {"stage": "rloo", "step": step, "time": 0.0}
        row |= {"rloo/kl_mean": 0.5 * step, "rloo/proxy_score_mean": 1.0 * step, "rloo/gold_score_mean": 0.1 * step}
        if step > 1:
            row |= {"rloo/monitor/proxy_rise": 1.0, "rloo/monitor/gold_rise": 0.0}
            row["rloo/overoptimised"] = float(step in overoptimised)
        rows.append(row)
    run_dir.mkdir()
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {"reward_model": {"objective": objective}, "rloo": {"kl_coefficient": kl_coefficient}}
    (run_dir / "config.resolved.json").write_text(json.dumps(config))
    return run_dir


def test_rings_are_around_the_steps_that_the_monitor_called_over_optimised(tmp_path: Path) -> None:
    run = read_run(run_with(tmp_path / "weak", objective="bt", kl_coefficient=0.0, overoptimised={3, 4}))
    figure = scores_by_kl([run])
    rings = [
        [tuple(point) for point in dots.get_offsets()]
        for axes in figure.axes
        for dots in axes.collections
        if dots.get_label() == ALARM_LABEL
    ]
    assert rings == [[(1.5, 3.0), (2.0, 4.0)], [(1.5, 0.1 * 3), (2.0, 0.4)]]
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [
        "proxy, a step",
        "proxy, moving mean",
        "gold, a step",
        "gold, moving mean",
        ALARM_LABEL,
    ]


def test_a_title_says_what_the_policy_was_trained_against(tmp_path: Path) -> None:
    weak = read_run(run_with(tmp_path / "weak", objective="bt", kl_coefficient=0.0, overoptimised=set()))
    default = read_run(run_with(tmp_path / "default", objective="bsr", kl_coefficient=0.2, overoptimised=set()))
    assert title_of(weak) == "Against Bradley-Terry, 7 steps of training;\nno KL cost"
    assert title_of(default) == "Against BSR, 7 steps of training;\nKL coefficient 0.2"


def test_the_command_writes_the_same_bytes_again(tmp_path: Path) -> None:
    runs = [
        run_with(tmp_path / name, objective="bt", kl_coefficient=0.0, overoptimised={2}) for name in ("left", "right")
    ]
    for out in ("one.png", "two.png"):
        main([*map(str, runs), "--out", str(tmp_path / out)])
    assert (tmp_path / "one.png").read_bytes()[:4] == b"\x89PNG"
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()
