"""The study's command: with every row present, nothing runs and nothing changes.

With some rows missing, it says which, and starts nothing that it has no time for.
"""

from pathlib import Path

import pytest
import ray

from research.study.__main__ import main
from research.study.grid import QUICK
from research.study.rows import Row, read_rows, write_rows
from tests.unit.research.study.made_up_rows import as_the_paper_says, study


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path / "runs" / "study_quick"


@pytest.fixture(scope="module")
def rows() -> dict[str, Row]:
    return {row.key: row for row in study(as_the_paper_says, QUICK)}


def state_of(folder: Path) -> dict[Path, tuple[bytes, int]]:
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file()}


def test_a_complete_study_runs_nothing_and_changes_nothing(
    folder: Path, rows: dict[str, Row], capsys: pytest.CaptureFixture[str]
) -> None:
    write_rows(folder / "study" / "results.jsonl", rows)
    assert main("", ["--quick"]) == 0
    before = state_of(folder)
    assert (folder / "study.md") in before
    assert main("", ["--quick"]) == 0
    assert state_of(folder) == before
    assert capsys.readouterr().out.splitlines()[-1] == f"10 rows, 0 missing; {folder}/study.md is unchanged"
    assert not ray.is_initialized()


def test_missing_rows_are_named_and_rows_of_other_settings_kept_but_not_shown(
    folder: Path, rows: dict[str, Row], capsys: pytest.CaptureFixture[str]
) -> None:
    first, *others = rows.values()
    outdated = Row(
        "0" * 12, first.part, first.world, first.variant, first.seed, 1e6, first.figures, first.curves, first.about
    )
    write_rows(folder / "study" / "results.jsonl", {row.key: row for row in (outdated, *others)})
    assert main("", ["--quick", "--max-minutes", "0"]) == 0
    assert "9 rows, 1 missing" in capsys.readouterr().out
    text = " ".join((folder / "study.md").read_text().split())
    assert "9 runs took 0.1 hours in total" in text  # 9 minutes, and not the 11 days of the other row
    assert f"These runs are missing: 1 of {first.part} on {first.world}" in text
    assert len(read_rows(folder / "study" / "results.jsonl")) == 10


def test_without_the_real_data_its_runs_are_refused_with_the_folder_that_was_given(
    folder: Path,
    tmp_path: Path,
    rows: dict[str, Row],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("research.study.__main__.connect_to_ray", lambda: None)
    write_rows(folder / "study" / "results.jsonl", {key: row for key, row in rows.items() if row.world == "embedded"})
    assert main("", ["--quick", "--data", str(tmp_path / "nowhere")]) == 2
    assert f"There is no rmb_pairs.parquet in {tmp_path}/nowhere" in capsys.readouterr().err
