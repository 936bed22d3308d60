"""Verdicts follow the numbers of the rows; the document is made from them alone, and twice the same."""

from collections.abc import Callable
from pathlib import Path

import pytest

from rm_robust.study.claims import findings
from rm_robust.study.document import write_document
from rm_robust.study.grid import FULL, WORLDS, Cell
from rm_robust.study.measure import CURVES, HELD_OUT, NUM_CURVE_POINTS, RLOO_CURVES, RLOO_EVALUATION, SCENARIOS, TRAINING
from rm_robust.study.rows import Row

Number = Callable[[Cell, int, str, str], float]
SEED_NOISE = (0.001, -0.001, 0.0005, -0.0005, 0.0)


def study(number: Number) -> list[Row]:
    """Every row of a whole study, whose figures are number(cell, epoch, set, metric) with a little of its seed."""
    rows = []
    for cell in FULL.cells(WORLDS):
        noise = SEED_NOISE[cell.seed]
        if cell.part == "rloo":
            names = [f"{name.removeprefix('rloo/')}_last" for name in RLOO_CURVES] + [f"evaluation_{name}" for name in RLOO_EVALUATION]
            names += ["gold_rise_first_half", "gold_rise_second_half", "num_overoptimised_steps"]
            figures = {name: number(cell, 3, "rloo", name) + noise for name in names}
            curves = {name.removeprefix("rloo/"): [0.1 * step for step in range(20)] for name in RLOO_CURVES}
        else:
            figures = {f"{e}/{s}/{m}": number(cell, e, s, m) + noise for e in (1, 2, 3) for s in SCENARIOS for m in HELD_OUT if has(cell, s, m)}
            figures |= {f"{e}/train/{m}": number(cell, e, "train", m) + noise for e in (0, 1, 2, 3) for m in TRAINING}
            figures |= {f"rm_bench/overall.{m}": number(cell, 3, "rm_bench", m) + noise for m in ("hard", "easy")} if cell.world == "rmb" else {}
            curves = {name: [1.0 + 0.01 * point for point in range(NUM_CURVE_POINTS)] for name in CURVES}
        about: dict[str, str | int | float] = {"num_training_pairs": 4000, "num_training_pairs_dropped": 7, "num_steps": 188}
        rows.append(Row(f"{len(rows):012x}", cell.part, cell.world, cell.variant, cell.seed, 60.0, figures, curves, about))
    return rows


def has(cell: Cell, scenario: str, metric: str) -> bool:
    return metric != "kendall_tau_b" or (cell.world == "embedded" and scenario != "in_domain")


def as_the_paper_says(cell: Cell, epoch: int, where: str, metric: str) -> float:
    """A world in which every claim holds by 0.1 or more for every seed, but the head's norm, which stays."""
    is_bt, is_bsr = cell.variant == "bt", cell.variant.startswith("bsr")
    quality = {"bt": 0.5, "hinge": 0.5, "bt_dr": 0.1, "bt_norm": 0.0}.get(cell.variant, 0.7)
    strength = {"bsr_0.03": 0.0, "bsr_0.1": 0.1, "bsr_1": 0.2}.get(cell.variant, -0.2)
    known: dict[str, float] = {
        "head_norm": 1.0,
        "hidden_norm_mean": 10.0,
        "hidden_norm_std": 1.0 + epoch * (2.0 if is_bt else 0.1),
        "final_hidden_distance_mean": 1.0 + epoch,
        "effective_rank": 10.0 + (5.0 if is_bt and where == "mutual_disjoint" else 0.0),
        "hard": 0.5 + strength,
        "easy": 0.8 - strength,
        "gold_rise_first_half": 0.5,
        "gold_rise_second_half": 0.3 if is_bsr else 0.0,
        "gold_score_mean_last": 0.9 if is_bsr else 0.6,
        "evaluation_length_controlled_win_rate": 0.8 if is_bsr else 0.6,
        "evaluation_completion_tokens_mean": 9.0 if is_bsr else 12.0,
    }
    agreement = quality + (0.1 * epoch if where == "in_domain" else -0.1 * epoch if is_bt else 0.0)
    return known.get(metric, agreement)


def verdicts(number: Number) -> set[str]:
    return {finding.verdict for finding in findings(study(number))}


def test_rows_of_a_world_in_which_the_paper_is_right_reproduce_every_claim() -> None:
    assert verdicts(as_the_paper_says) == {"reproduced"}


def test_rows_that_do_not_depend_on_the_objective_reproduce_no_comparison() -> None:
    found = findings(study(lambda cell, epoch, where, metric: as_the_paper_says(Cell(cell.part, cell.world, "bt", cell.seed), epoch, where, metric)))
    compared = [finding for finding in found if "minus" in finding.claim.what and not finding.claim.what.startswith(("BT:", "BSR:", "BSR minus BT, in-domain"))]
    assert len(compared) > 20
    assert {finding.verdict for finding in compared} == {"not seen at this scale"}


def test_the_reverse_of_the_paper_is_called_contradicted() -> None:
    def reversed_twins(cell: Cell, epoch: int, where: str, metric: str) -> float:
        swapped = {"bt": "bsr_0.1", "bsr_0.1": "bt"}.get(cell.variant, cell.variant)
        return as_the_paper_says(Cell(cell.part, cell.world, swapped, cell.seed), epoch, where, metric)

    found = {(f.claim.title, f.world): f.verdict for f in findings(study(reversed_twins))}
    assert found["BSR is better than BT on mutual-disjoint", "embedded"] == "contradicted"
    assert found["… with shorter answers", "embedded"] == "contradicted"
    assert found["BSR is better than BT on RM-Bench's hard comparisons", "rmb"] == "contradicted"


def test_two_seeds_are_no_verdict_and_none_is_not_run() -> None:
    rows = [row for row in study(as_the_paper_says) if row.seed < 2 and row.world == "embedded"]
    assert {f.verdict for f in findings(rows) if f.world == "embedded"} == {"no verdict: 2 seeds"}
    assert {f.verdict for f in findings(rows) if f.world == "rmb"} == {"not run"}


def test_the_same_rows_make_the_same_files_and_leave_them_alone(tmp_path: Path) -> None:
    path = tmp_path / "STUDY.md"
    rows = study(as_the_paper_says)
    assert write_document(path, rows, [])
    before = {file: (file.read_bytes(), file.stat().st_mtime_ns) for file in tmp_path.rglob("*") if file.is_file()}
    assert {file.name for file in before} == {"STUDY.md", "gold_by_kl.png"} | {f"{n}_{w}.png" for n in ("scenarios", "epochs", "dispersion") for w in WORLDS}
    assert not write_document(path, rows, [])
    assert {file: (file.read_bytes(), file.stat().st_mtime_ns) for file in tmp_path.rglob("*") if file.is_file()} == before
    text = path.read_text()
    assert "Not complete" not in text
    for name in before:
        assert name.name == "STUDY.md" or f"(study/{name.name})" in text


@pytest.mark.parametrize("num_rows", [0, 1])
def test_a_study_that_has_hardly_begun_says_what_is_missing(tmp_path: Path, num_rows: int) -> None:
    rows = study(as_the_paper_says)
    write_document(tmp_path / "STUDY.md", rows[:num_rows], [row.cell for row in rows[num_rows:]])
    text = (tmp_path / "STUDY.md").read_text()
    assert f"missing are {45 - num_rows} of reward_model on embedded, 45 of reward_model on rmb, 6 of rloo on embedded" in text
