"""Which stages ask the cluster for something, how a run's service is named, and what a run that fails says."""

import pickle
from collections.abc import Sequence
from pathlib import Path

import pytest
from ray import cloudpickle
from ray.exceptions import NodeDiedError, RayTaskError
from ray.train.v2.api.exceptions import WorkerGroupError

from pipelines.arguments import STAGE_NAMES
from pipelines.command import BY_NAME, parsed
from pipelines.driver import exit_code_of, run_of, stages_ahead
from pipelines.stages import ALL_STAGES, REWARD_MODEL_STAGES, Stage
from rm_robust.config.loading import load_config
from rm_robust.errors import DataError, StorageError
from rm_robust.runs.directory import Run
from rm_robust.runs.layout import STAGES
from serve.run_service import service_name

SMOKE = Path("pipelines/configs/smoke.toml")


def commit(run_dir: Path, *stages: str) -> None:
    (run_dir / "stages").mkdir(parents=True, exist_ok=True)
    for stage in stages:
        (run_dir / "stages" / f"{stage}.json").write_text("{}")


def names(stages: Sequence[Stage]) -> list[str]:
    return [stage.name for stage in stages]


def test_every_stage_that_records_itself_is_run_in_the_order_of_the_layout() -> None:
    recorded = [stage.name for stage in STAGES]
    assert [name for name in names(ALL_STAGES) if name in recorded] == recorded


def test_stages_that_reach_another_node_are_the_same_stages() -> None:
    """The driver's task asks whether RLOO and the twin are among them."""
    assert pickle.loads(cloudpickle.dumps(ALL_STAGES)) == ALL_STAGES


def test_a_stage_that_is_to_be_done_again_is_named_as_the_layout_names_it_and_is_ahead(tmp_path: Path) -> None:
    assert tuple(stage.name for stage in STAGES) == STAGE_NAMES
    arguments = ["--config", str(SMOKE), "--run-dir", str(tmp_path), "--again", "evaluation"]
    run = run_of(parsed(BY_NAME["run"], arguments))
    commit(tmp_path, *STAGE_NAMES)
    assert names(stages_ahead(run, ALL_STAGES)) == ["evaluation"]


def test_what_is_not_committed_is_ahead(tmp_path: Path) -> None:
    run = Run(load_config(SMOKE, []), tmp_path)
    assert names(stages_ahead(run, ALL_STAGES)) == ["sft", "preferences", "reward_model", "evaluation", "rloo"]
    commit(tmp_path, "world", "sft", "preferences")
    assert names(stages_ahead(run, ALL_STAGES)) == ["reward_model", "evaluation", "rloo"]
    assert names(stages_ahead(run, REWARD_MODEL_STAGES)) == ["reward_model", "evaluation"]


def test_the_bradley_terry_twin_asks_for_what_the_reward_model_does(tmp_path: Path) -> None:
    run = Run(load_config(SMOKE, ["reward_model.bt_twin=true"]), tmp_path)
    commit(tmp_path, "world", "sft", "preferences", "reward_model", "evaluation", "rloo")
    assert names(stages_ahead(run, ALL_STAGES)) == ["reward_model", "evaluation"]
    commit(tmp_path / "bt_twin", "reward_model")
    assert names(stages_ahead(run, ALL_STAGES)) == ["evaluation"]
    commit(tmp_path / "bt_twin", "evaluation")
    assert names(stages_ahead(run, ALL_STAGES)) == []


def test_two_runs_of_one_name_have_a_service_each(tmp_path: Path) -> None:
    config = load_config(SMOKE, [])
    names = {service_name(Run(config, tmp_path / folder)) for folder in ("one", "two")}
    assert len(names) == 2
    assert all(name.startswith("smoke-") for name in names)
    assert service_name(Run(config, tmp_path / "one")) in names


def in_task(error: Exception) -> Exception:
    """Return the error as `ray.get` raises it for a task: an instance of Ray's class and of its own class."""
    raised: Exception = RayTaskError(
        "driver", "Traceback (most recent call last):\n  File drive.py", error
    ).as_instanceof_cause()
    return raised


GROUP = WorkerGroupError(
    "[Rank 1]\nTraceback …",
    {0: RuntimeError("Connection closed by peer"), 1: StorageError("the state could not be written: full")},
)


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (DataError("there is no file"), 2, "error: there is no file\n"),
        (in_task(DataError("there is no file")), 2, "error: there is no file\n"),
        (in_task(in_task(DataError("there is no file"))), 2, "error: there is no file\n"),
        (GROUP, 2, "error: the state could not be written: full\n"),
        (in_task(GROUP), 2, "error: the state could not be written: full\n"),
        (
            WorkerGroupError("rank 0 died", {0: RuntimeError("x")}),
            1,
            "error: Training failed due to worker errors:\nrank 0 died\nThe same command",
        ),
        (
            NodeDiedError("Task failed due to the node dying."),
            1,
            "error: Task failed due to the node dying.\nThe same command again resumes",
        ),
    ],
)
def test_a_failure_that_is_no_defect_is_said_in_one_line_wherever_it_was_raised(
    capsys: pytest.CaptureFixture[str], error: Exception, code: int, line: str
) -> None:
    def work() -> None:
        raise error

    assert exit_code_of(work) == code
    assert capsys.readouterr().err.startswith(line)


def test_a_defect_is_raised_whole() -> None:
    def work() -> None:
        raise in_task(ZeroDivisionError("of our own"))

    with pytest.raises(ZeroDivisionError):
        exit_code_of(work)


def test_a_judge_may_be_served_elsewhere_and_its_address_may_hold_no_password(tmp_path: Path) -> None:
    arguments = ["--config", str(SMOKE), "--run-dir", str(tmp_path / "run"), "--set"]
    run = run_of(parsed(BY_NAME["run"], [*arguments, 'serve.gold="http://127.0.0.1:8000/gold"']))
    assert run.config.serve.gold_url == "http://127.0.0.1:8000/gold"
    for address in ("http://me:secret@127.0.0.1:8000", "s3://me:secret@bucket/runs/gold"):
        with pytest.raises(DataError, match="holds a password, which would be written"):
            run_of(parsed(BY_NAME["run"], [*arguments, f'serve.gold="{address}"']))
    with pytest.raises(DataError, match="hdfs://host/gold cannot hold a run"):
        run_of(parsed(BY_NAME["run"], [*arguments, 'serve.gold="hdfs://host/gold"']))
