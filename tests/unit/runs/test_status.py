"""A run's files say where it stands."""

import json
import os
import socket
import subprocess
import time
from pathlib import Path

import pytest

from pipelines.command import main
from rm_robust.config.loading import load_config
from rm_robust.errors import DataError
from rm_robust.runs.claim import only_writer
from rm_robust.runs.directory import claim_run_dir
from rm_robust.runs.layout import RunLayout
from rm_robust.runs.lock import is_written, lock_path, this_process
from rm_robust.runs.status import runs_in, seconds_left, status_lines, status_of

SMOKE = Path("pipelines/configs/smoke.toml")


def write_metrics(run_dir: Path, lines: list[dict[str, object]]) -> None:
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """Make a run with SFT done, and the reward model at step 30 of 50. A step takes two seconds; one took a minute."""
    now = time.time()
    folder = tmp_path / "runs" / "smoke"
    claim_run_dir(folder, load_config(SMOKE, []))
    for stage in ("world", "sft", "preferences"):
        RunLayout(folder).run_stage(stage, dict)
    times = [now - 10 - 2 * (30 - step) - (60 if step < 25 else 0) for step in range(1, 31)]
    lines: list[dict[str, object]] = [{"stage": "sft", "step": 9, "num_steps": 9, "time": now - 500, "sft/loss": 1.5}]
    lines += [
        {
            "stage": "reward_model",
            "step": step,
            "num_steps": 50,
            "time": at,
            "reward_model/loss": 1 / step,
            "reward_model/accuracy": 0.7,
        }
        for step, at in enumerate(times, start=1)
    ]
    lines[-3]["reward_model/in_domain_accuracy"] = 0.625
    write_metrics(folder, lines)
    return folder


def test_each_stage_is_done_begun_or_waiting(run_dir: Path) -> None:
    stages = {own.stage: own for own in status_of(run_dir)}
    assert [own.state for own in stages.values()] == ["done", "done", "done", "begun", "waiting", "waiting"]
    training = stages["reward_model"]
    assert (training.step, training.num_steps) == (30, 50)
    assert training.seconds_left == pytest.approx(20 * 2)
    assert training.seconds_since_last_step == pytest.approx(10, abs=5)
    assert training.metrics == {
        "reward_model/loss": pytest.approx(1 / 30),
        "reward_model/accuracy": 0.7,
        "reward_model/in_domain_accuracy": 0.625,
    }
    assert (stages["sft"].step, stages["sft"].seconds_left) == (9, None)


def test_a_stage_that_the_config_leaves_out_is_not_listed(tmp_path: Path) -> None:
    claim_run_dir(tmp_path / "run", load_config(SMOKE, ["sft.enabled=false", 'model.path="somewhere"']))
    assert "sft" not in [own.stage for own in status_of(tmp_path / "run")]


def test_the_twin_is_shown_where_its_turn_is_and_at_work_while_it_trains(tmp_path: Path) -> None:
    run_dir = tmp_path / "runs" / "with_twin"
    config = load_config(SMOKE, ["reward_model.bt_twin=true"])
    claim_run_dir(run_dir, config)
    names = [own.stage for own in status_of(run_dir)]
    assert names[-4:] == ["evaluation", "bt_twin/reward_model", "bt_twin/evaluation", "rloo"]
    RunLayout(run_dir).rloo_prompts.mkdir(parents=True)
    assert {own.state for own in status_of(run_dir)} == {"waiting"}
    for stage in ("world", "sft", "preferences", "reward_model", "evaluation"):
        RunLayout(run_dir).run_stage(stage, dict)
    twin_dir = RunLayout(run_dir).bt_twin
    claim_run_dir(twin_dir, config)
    now = time.time()
    write_metrics(
        twin_dir,
        [
            {"stage": "reward_model", "step": n, "num_steps": 8, "time": now - 9 + 3 * n, "reward_model/loss": 0.5}
            for n in (1, 2, 3)
        ],
    )
    (own,) = [own for own in status_of(run_dir) if own.state == "begun"]
    assert (own.stage, own.step, own.num_steps, own.metrics) == (
        "bt_twin/reward_model",
        3,
        8,
        {"reward_model/loss": 0.5},
    )
    assert own.seconds_left == pytest.approx(5 * 3)
    assert runs_in(tmp_path / "runs") == [run_dir]


def test_one_step_alone_has_no_pace_and_a_run_before_its_first_step_has_none_left(run_dir: Path) -> None:
    assert seconds_left([1.0], 7) is None
    write_metrics(run_dir, [{"stage": "reward_model", "step": 1, "time": time.time()}])
    (training,) = [own for own in status_of(run_dir) if own.stage == "reward_model"]
    assert (training.step, training.num_steps, training.seconds_left) == (1, None, None)


def test_the_lines_say_what_the_numbers_are(run_dir: Path) -> None:
    lines = status_lines(run_dir, status_of(run_dir))
    assert lines[0] == str(run_dir)
    assert "reward_model         begun    step 30 of 50, last step" in lines[4]
    assert "about 40 s left, loss 0.03333, accuracy 0.7, in_domain_accuracy 0.625" in lines[4]
    assert lines[5].split() == ["evaluation", "waiting"]


def states(run_dir: Path) -> list[str]:
    return [own.state for own in status_of(run_dir)]


def test_a_run_whose_process_has_ended_is_stopped_where_it_was_and_has_no_time_left(run_dir: Path) -> None:
    with only_writer(run_dir):  # the process of this test writes
        assert states(run_dir)[3:] == ["begun", "waiting", "waiting"]
    ended = subprocess.Popen(["true"])
    ended.wait()
    lock_path(run_dir).write_text(f"process {ended.pid} on {socket.gethostname()}\n")
    assert states(run_dir)[3:] == ["stopped", "not run", "not run"]
    line = status_lines(run_dir, status_of(run_dir))[4]
    assert "reward_model         stopped  at step 30 of 50, last step" in line
    assert "left" not in line


def test_a_process_that_got_the_number_of_an_ended_one_does_not_write_its_run(run_dir: Path) -> None:
    lock_path(run_dir).write_text(this_process())
    os.utime(lock_path(run_dir), (1e9, 1e9))  # long before the process that has the number now
    assert is_written(run_dir) is False


def test_without_a_lock_of_this_machine_the_age_of_the_last_step_says_whether_a_run_is_stopped(run_dir: Path) -> None:
    assert is_written(run_dir) is None
    lock_path(run_dir).write_text("process 1 on another-machine\n")
    assert is_written(run_dir) is None
    assert states(run_dir)[3] == "begun"
    write_metrics(run_dir, [{"stage": "reward_model", "step": 3, "num_steps": 50, "time": time.time() - 3600}])
    assert states(run_dir)[3] == "stopped"


def test_a_run_without_prompts_for_rloo_does_not_wait_for_it_and_its_twin_keeps_its_place(tmp_path: Path) -> None:
    own_data = ["data.source=scenarios", 'data.train=["a"]', 'data.in_domain=["b"]', 'data.sft=["c"]']
    claim_run_dir(tmp_path / "run", load_config(SMOKE, [*own_data, "reward_model.bt_twin=true"]))
    names = [own.stage for own in status_of(tmp_path / "run")]
    assert names[-4:] == ["reward_model", "evaluation", "bt_twin/reward_model", "bt_twin/evaluation"]


def test_a_folder_of_runs_shows_the_latest_first_and_one_without_any_is_refused(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "runs" / "other"
    claim_run_dir(other, load_config(SMOKE, ["name=other"]))
    write_metrics(run_dir, [])
    assert set(runs_in(tmp_path / "runs")) == {run_dir, other}
    assert main(["status", "--json", str(tmp_path / "runs")]) == 0
    assert set(json.loads(capsys.readouterr().out)) == {str(run_dir), str(other)}
    with pytest.raises(DataError, match="There is no run in"):
        runs_in(run_dir / "stages")
    assert main(["status", str(run_dir / "stages")]) == 2
    assert "There is no run in" in capsys.readouterr().err
