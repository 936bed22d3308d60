"""A stage runs once: its record is written when its work is done, and not before."""

import json
from pathlib import Path
from typing import Any

import pytest

from rm_robust.config.run import PipelineConfig
from rm_robust.errors import DataError, StorageError
from rm_robust.runs.layout import RunLayout
from tests.support.full_storage import files_of_at_most


def test_a_stage_is_done_once_and_then_skipped(tmp_path: Path) -> None:
    layout = RunLayout(tmp_path)
    calls: list[int] = []

    def work() -> dict[str, Any]:
        assert not layout.is_done("sft")
        calls.append(1)
        return {"num_steps": 7}

    assert [layout.run_stage("sft", work) for _ in range(3)] == [True, False, False]
    assert calls == [1]
    assert layout.is_done("sft")
    assert layout.stage_result("sft")["num_steps"] == 7


def test_a_stage_that_fails_is_done_again(tmp_path: Path) -> None:
    layout = RunLayout(tmp_path)

    def fail() -> dict[str, Any]:
        raise OSError("killed")

    with pytest.raises(OSError, match="killed"):
        layout.run_stage("sft", fail)
    assert not layout.is_done("sft")
    assert layout.run_stage("sft", dict)


def test_a_result_that_cannot_be_recorded_leaves_the_stage_undone(tmp_path: Path) -> None:
    layout = RunLayout(tmp_path)
    with pytest.raises(ValueError, match="not JSON compliant"):
        layout.run_stage("sft", lambda: {"loss": float("nan")})
    assert not layout.is_done("sft")


def test_a_record_for_which_there_is_no_room_is_one_error_that_names_it_and_the_stage_is_done_again(
    tmp_path: Path,
) -> None:
    layout = RunLayout(tmp_path)
    with (
        pytest.raises(
            StorageError, match=f"^{tmp_path}/stages/sft.json could not be written: File too large.*Make room"
        ),
        files_of_at_most(10),
    ):
        layout.run_stage("sft", dict)
    assert not layout.is_done("sft")
    assert layout.run_stage("sft", dict)


def test_the_record_names_stage_seconds_and_end(tmp_path: Path) -> None:
    RunLayout(tmp_path).run_stage("rloo", lambda: {})
    record = json.loads((tmp_path / "stages" / "rloo.json").read_text())
    assert record["stage"] == "rloo"
    assert 0 <= record["seconds"] < 10
    assert record["finished_at"] > 1.7e9


def test_the_seconds_of_a_resumed_stage_contain_the_steps_of_earlier_commands(tmp_path: Path) -> None:
    lines = [{"stage": stage, "step": 1, "time": 1.7e9, "time/step_s": 40.0} for stage in ("sft", "rloo", "rloo")]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    RunLayout(tmp_path).run_stage("rloo", dict)
    assert 80 <= RunLayout(tmp_path).stage_result("rloo")["seconds"] < 90


def test_asking_for_a_stage_that_has_not_run_says_which_and_how(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"'sft' has not run in {tmp_path}.*rm-robust run"):
        RunLayout(tmp_path).stage_result("sft")


def test_stages_start_from_the_users_model_where_there_is_one(tmp_path: Path) -> None:
    layout = RunLayout(tmp_path)
    own = PipelineConfig.model_validate({"name": "x", "model": {"path": "./my/model"}})
    tuned = PipelineConfig.model_validate({"name": "x", "model": {"path": "./my/model"}, "sft": {"enabled": False}})
    scratch = PipelineConfig(name="x")
    assert [layout.base_model_dir(config) for config in (own, tuned, scratch)] == [
        "./my/model",
        "./my/model",
        str(layout.base_model),
    ]
    assert [layout.sft_model_dir(config) for config in (own, tuned, scratch)] == [
        str(layout.sft_checkpoint),
        "./my/model",
        str(layout.sft_checkpoint),
    ]


def test_every_stage_gets_the_runs_own_copy_of_a_model_of_the_hub(tmp_path: Path) -> None:
    layout, copy = RunLayout(tmp_path), str(tmp_path / "models" / "owner--model")
    config = PipelineConfig.model_validate({"name": "x", "model": {"path": "owner/model"}, "sft": {"enabled": False}})
    assert [
        layout.base_model_dir(config),
        layout.sft_model_dir(config),
        layout.reward_model_base_dir(config),
    ] == [copy] * 3


def test_no_two_things_of_a_run_lie_at_one_place(tmp_path: Path) -> None:
    layout = RunLayout(tmp_path)
    places = [getattr(layout, name) for name, value in vars(RunLayout).items() if isinstance(value, property)]
    assert len(places) > 10
    assert len(set(places)) == len(places)
    assert all(tmp_path in place.parents for place in places)
