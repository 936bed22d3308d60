"""Check which sources are refused before Ray starts, and that every step of Ray Data asks for the task resources.

tests/component/test_data_pipeline.py runs the pipeline. test_token_rows.py checks what becomes of one row.
"""

import ast
from contextlib import nullcontext
from pathlib import Path

import pytest

import rm_robust.data.pipeline
from rm_robust.data.pipeline import (
    DataSource,
    SourceReport,
    TokeniseReport,
    _lost_fraction,
    _refuse_bad_sources,
    _warn_of_losses,
    check_sources,
)
from rm_robust.data.rows import RowKind
from rm_robust.data.token_rows import TokenLimits
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
    assert "must be a .jsonl, .json or .parquet file" in refusal(f"{folder}/rows.csv")


def test_hub_names_are_left_to_the_hub() -> None:
    check_sources([DataSource("train", ("hub:owner/name",), RowKind.PAIR)])


ASKS_WITH = {"map_batches": "resources", "write_parquet": "ray_remote_args"}
"""The argument of each step in Ray Data 2.60 that says which resources its tasks ask for."""
NO_TASKS_OF_THEIR_OWN = {"from_items"}
PIPELINE = Path(rm_robust.data.pipeline.__file__).read_text()


def check_steps(text: str) -> None:
    calls = [
        (node.func, {keyword.arg for keyword in node.keywords})
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Call)
    ]
    steps = [(function, arguments) for function, arguments in calls if isinstance(function, ast.Attribute)]
    assert {f.attr for f, _ in steps if ast.unparse(f.value) == "ray.data"} == NO_TASKS_OF_THEIR_OWN
    asking = [(f.attr, arguments) for f, arguments in steps if f.attr in ASKS_WITH]
    assert len(asking) == len(ASKS_WITH)
    assert [name for name, arguments in asking if ASKS_WITH[name] not in arguments] == []


def test_every_step_of_ray_data_asks_for_the_task_resources() -> None:
    check_steps(PIPELINE)


@pytest.mark.parametrize(
    ("old", "new"),
    [(", resources=resources\n", "\n"), ('ray_remote_args={"resources": resources},\n', "\n"), ("from_items", "range")],
)
def test_a_step_that_asks_for_nothing_is_found(old: str, new: str) -> None:
    assert old in PIPELINE
    with pytest.raises(AssertionError):
        check_steps(PIPELINE.replace(old, new, 1))


def report_of(num_kept: int, num_dropped: dict[str, int]) -> TokeniseReport:
    lost = _lost_fraction(num_kept, num_dropped)
    num_read = num_kept + sum(num_dropped.values())
    skipped = ["mine/a.csv: another format", "mine/.x.jsonl: hidden"]
    source = SourceReport(
        *(
            "train",
            ("mine",),
            1.0,
            num_read,
            num_kept,
            0,
            0,
            num_dropped,
            {"another format": 1, "hidden": 1},
            skipped,
            lost,
        )
    )
    return TokeniseReport({}, {}, {}, {}, [source], [])


LIMITS = TokenLimits(max_prompt_tokens=96, max_completion_tokens=96, max_dropped_fraction=0.0)


@pytest.mark.parametrize(
    ("num_kept", "num_dropped", "is_refused", "is_warned"),
    [
        (188, {"prompt too long": 2412}, True, True),
        (50, {"prompt too long": 25, "completion too long": 25}, False, True),  # half is not more than half
        (89, {"identical completions": 11}, False, True),
        (90, {"prompt too long": 10}, False, False),
        (20, {"tied scores": 80}, False, False),
    ],
)
def test_large_losses_are_refused_and_smaller_ones_warned_of(
    num_kept: int, num_dropped: dict[str, int], is_refused: bool, is_warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    report = report_of(num_kept, num_dropped)
    with pytest.raises(DataError) if is_refused else nullcontext() as refused:
        _refuse_bad_sources(report, LIMITS, 0.5)
    if refused is not None:
        assert "93 % of the rows of 'train' (mine) are lost (188 kept of 2600 read" in str(refused.value)
        assert "data.max_lost_fraction = 0.5" in str(refused.value)
    _warn_of_losses(report)
    loss, *files = caplog.messages if is_warned else ["", *caplog.messages]
    assert (f"{num_kept} kept of {report.sources[0].num_read}" in loss) == is_warned
    (text,) = files
    assert "Files of 'train' (mine) are not read" in text
    assert "First: mine/a.csv: another format" in text
    assert {record.levelname for record in caplog.records} == {"WARNING"}
