"""Which sources are refused before Ray starts. The Ray Data part is in tests/component, what becomes of one row in test_rows_tokenising.py."""

from pathlib import Path

import pytest

from rm_robust.data_pipeline import Source, check_sources
from rm_robust.errors import DataError
from rm_robust.rows import RowKind


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_missing_empty_and_foreign_sources_are_refused_by_path(tmp_path: Path, scheme: str) -> None:
    def refusal(path: str) -> str:
        with pytest.raises(DataError) as refused:
            check_sources([Source("train", (path,), RowKind.PAIR)])
        return str(refused.value)

    folder = f"{scheme}{tmp_path}"
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "rows.csv").write_text("a,b")
    assert refusal(f"{folder}/nothing.jsonl") == f"There is no file or folder at {folder}/nothing.jsonl."
    assert refusal(f"{folder}/empty.jsonl") == f"{folder}/empty.jsonl (train) is empty: there is no row in it."
    assert "must be a .jsonl or .parquet file" in refusal(f"{folder}/rows.csv")


def test_hub_names_are_left_to_the_hub() -> None:
    check_sources([Source("train", ("hub:owner/name",), RowKind.PAIR)])
