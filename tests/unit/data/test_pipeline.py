"""Check which sources are refused before Ray starts, and that every step of Ray Data asks for the task resources.

tests/component/test_data_pipeline.py runs the pipeline. test_token_rows.py checks what becomes of one row.
"""

import ast
from pathlib import Path

import pytest

import rm_robust.data.pipeline
from rm_robust.data.pipeline import DataSource, check_sources
from rm_robust.data.rows import RowKind
from rm_robust.errors import DataError


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_missing_empty_and_foreign_sources_are_refused_by_path(tmp_path: Path, scheme: str) -> None:
    def refusal(path: str) -> str:
        with pytest.raises(DataError) as refused:
            check_sources([DataSource("train", (path,), RowKind.PAIR)])
        return str(refused.value)

    folder = f"{scheme}{tmp_path}"
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "rows.csv").write_text("a,b")
    assert refusal(f"{folder}/nothing.jsonl") == f"There is no file or folder at {folder}/nothing.jsonl."
    assert refusal(f"{folder}/empty.jsonl") == f"{folder}/empty.jsonl (train) is empty: there is no row in it."
    assert "must be a .jsonl or .parquet file" in refusal(f"{folder}/rows.csv")


def test_hub_names_are_left_to_the_hub() -> None:
    check_sources([DataSource("train", ("hub:owner/name",), RowKind.PAIR)])


ASKS_WITH = {"map_batches": "resources", "read_parquet": "resources", "write_parquet": "ray_remote_args"}
"""The argument of each step in Ray Data 2.60 that says which resources its tasks ask for."""
NO_TASKS_OF_THEIR_OWN = {"from_items", "from_arrow"}
PIPELINE = Path(rm_robust.data.pipeline.__file__).read_text()


def check_steps(text: str) -> None:
    calls = [
        (node.func, {keyword.arg for keyword in node.keywords})
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Call)
    ]
    steps = [(function, arguments) for function, arguments in calls if isinstance(function, ast.Attribute)]
    assert {f.attr for f, _ in steps if ast.unparse(f.value) == "ray.data"} == {"read_parquet", *NO_TASKS_OF_THEIR_OWN}
    asking = [(f.attr, arguments) for f, arguments in steps if f.attr in ASKS_WITH]
    assert len(asking) >= 6
    assert [name for name, arguments in asking if ASKS_WITH[name] not in arguments] == []


def test_every_step_of_ray_data_asks_for_the_task_resources() -> None:
    check_steps(PIPELINE)


@pytest.mark.parametrize(
    ("old", "new"),
    [(", resources=resources)", ")"), ('ray_remote_args={"resources": resources},\n', "\n"), ("from_items", "range")],
)
def test_a_step_that_asks_for_nothing_is_found(old: str, new: str) -> None:
    assert old in PIPELINE
    with pytest.raises(AssertionError):
        check_steps(PIPELINE.replace(old, new, 1))
