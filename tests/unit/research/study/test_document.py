"""Verdicts follow the rows' numbers. The document depends on the rows alone, and the same rows give the same files."""

from pathlib import Path

import pytest

from research.study.claims import findings
from research.study.document import write_document
from research.study.grid import WORLDS, Cell
from tests.unit.research.study.made_up_rows import Number, as_the_paper_says, study


def verdicts(number: Number) -> set[str]:
    return {finding.verdict for finding in findings(study(number))}


def test_rows_of_a_world_in_which_the_paper_is_right_reproduce_every_claim() -> None:
    assert verdicts(as_the_paper_says) == {"reproduced"}


def test_rows_that_do_not_depend_on_the_objective_reproduce_no_comparison() -> None:
    all_findings = findings(
        study(
            lambda cell, epoch, where, metric: as_the_paper_says(
                Cell(cell.part, cell.world, "bt", cell.seed), epoch, where, metric
            )
        )
    )
    compared = [
        finding
        for finding in all_findings
        if finding.claim.quantity.startswith(("BSR", "BT minus", "DR minus"))
        and ", plus " not in finding.claim.quantity
    ]
    compared = [finding for finding in compared if not finding.claim.quantity.startswith("BSR:")]
    assert len(compared) > 20
    assert {finding.verdict for finding in compared} == {"not seen at this scale"}


def test_the_reverse_of_the_paper_is_called_contradicted() -> None:
    def reversed_twins(cell: Cell, epoch: int, where: str, metric: str) -> float:
        swapped = {"bt": "bsr_0.1", "bsr_0.1": "bt"}.get(cell.variant, cell.variant)
        return as_the_paper_says(Cell(cell.part, cell.world, swapped, cell.seed), epoch, where, metric)

    verdict = {(f.claim.title, f.world): f.verdict for f in findings(study(reversed_twins))}
    assert verdict["BSR is better than BT on mutual-disjoint", "embedded"] == "contradicted"
    assert verdict["… with shorter answers", "embedded"] == "contradicted"
    assert verdict["BSR is better than BT on RM-Bench's hard comparisons", "rmb"] == "contradicted"


def test_two_seeds_are_no_verdict_and_none_is_not_run() -> None:
    rows = [row for row in study(as_the_paper_says) if row.seed < 2 and row.world == "embedded"]
    assert {f.verdict for f in findings(rows) if f.world == "embedded"} == {"no verdict: 2 seeds"}
    assert {f.verdict for f in findings(rows) if f.world == "rmb"} == {"not run"}


def test_the_same_rows_make_the_same_files_and_leave_them_alone(tmp_path: Path) -> None:
    path = tmp_path / "study.md"
    rows = study(as_the_paper_says)
    assert write_document(path, rows, [])
    before = {file: (file.read_bytes(), file.stat().st_mtime_ns) for file in tmp_path.rglob("*") if file.is_file()}
    assert {file.name for file in before} == {"study.md", "gold_by_kl.png"} | {
        f"{n}_{w}.png" for n in ("scenarios", "epochs", "dispersion") for w in WORLDS
    }
    assert not write_document(path, rows, [])
    assert {
        file: (file.read_bytes(), file.stat().st_mtime_ns) for file in tmp_path.rglob("*") if file.is_file()
    } == before
    text = path.read_text()
    assert "Not complete" not in text
    for name in before:
        assert name.name == "study.md" or f"(study/{name.name})" in text


@pytest.mark.parametrize("num_rows", [0, 1])
def test_a_study_that_has_hardly_begun_says_what_is_missing(tmp_path: Path, num_rows: int) -> None:
    rows = study(as_the_paper_says)
    write_document(tmp_path / "study.md", rows[:num_rows], [row.cell for row in rows[num_rows:]])
    text = " ".join((tmp_path / "study.md").read_text().split())
    missing = f"{45 - num_rows} of reward_model on embedded, 45 of reward_model on rmb, 6 of rloo on embedded"
    assert f"These runs are missing: {missing}" in text


def test_an_accuracy_is_never_subtracted_from_a_tau() -> None:
    """Accuracy over pairs falls by 0.02 in-domain and on mutual-disjoint, so neither is ahead.

    The tau-b of mutual-disjoint falls by twice that.
    """

    def falling(cell: Cell, epoch: int, where: str, metric: str) -> float:
        return 0.9 - 0.01 * epoch * (2 if metric == "kendall_tau_b" else 1)

    (finding,) = [
        f for f in findings(study(falling)) if f.claim.title.startswith("BT over-optimises") and f.world == "embedded"
    ]
    assert finding.interval is not None
    assert finding.interval.mean == pytest.approx(0, abs=1e-12)
    assert finding.verdict == "not seen at this scale"


def test_a_second_half_in_which_both_policies_improve_alike_is_no_stagnation() -> None:
    def alike(cell: Cell, epoch: int, where: str, metric: str) -> float:
        return {"gold_rise_first_half": 1.0, "gold_rise_second_half": 0.8}.get(metric, 0.5)

    verdict = {f.claim.title: f.verdict for f in findings(study(alike))}
    title = "In the second half, a policy trained against BT stagnates, and one trained against BSR does not"
    assert verdict[title] == "not seen at this scale"
