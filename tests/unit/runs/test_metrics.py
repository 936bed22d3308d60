"""MetricsWriter keeps one record per step through kills and resumes."""

import json
import logging
import math
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rm_robust.errors import DataError, RmRobustError, StorageError
from rm_robust.runs.metrics import MetricsWriter, log_step, read_metrics
from rm_robust.runs.storage.commits import write_json_atomic
from tests.support.full_storage import files_of_at_most


def steps_of(run_dir: Path, stage: str) -> list[int]:
    return [int(line["step"]) for line in read_metrics(run_dir, stage)]


def write_steps(run_dir: Path, stage: str, *, resume_step: int, last_step: int) -> None:
    with MetricsWriter(run_dir, stage, resume_step) as writer:
        for step in range(resume_step + 1, last_step + 1):
            writer.write(step, {f"{stage}/loss": 1.0 / step})


def test_every_line_is_on_disk_before_the_next_is_begun(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path, "sft", 0) as writer:
        for step in (1, 2):
            writer.write(step, {"sft/loss": 0.5})
            assert steps_of(tmp_path, "sft") == list(range(1, step + 1))


def test_a_line_holds_stage_step_time_and_the_metrics(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path, "rloo", 0) as writer:
        writer.write(1, {"rloo/gold_score_mean": 0.1, "time/step_s": 2, "rloo/kl_mean": -1e-9})
    line = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert line.pop("time") > 1.7e9
    assert line == {"stage": "rloo", "step": 1, "rloo/gold_score_mean": 0.1, "time/step_s": 2, "rloo/kl_mean": -1e-9}


def test_a_killed_and_resumed_stage_has_each_step_once_and_other_stages_are_untouched(tmp_path: Path) -> None:
    write_steps(tmp_path, "sft", resume_step=0, last_step=5)
    write_steps(tmp_path, "reward_model", resume_step=0, last_step=7)  # killed after 7, committed 4
    write_steps(tmp_path, "reward_model", resume_step=4, last_step=10)
    assert steps_of(tmp_path, "reward_model") == list(range(1, 11))
    assert steps_of(tmp_path, "sft") == [1, 2, 3, 4, 5]


def test_a_stage_started_afresh_forgets_its_earlier_attempt(tmp_path: Path) -> None:
    write_steps(tmp_path, "sft", resume_step=0, last_step=5)
    write_steps(tmp_path, "sft", resume_step=0, last_step=2)
    assert steps_of(tmp_path, "sft") == [1, 2]


@pytest.mark.parametrize("torn", ['{"stage": "rloo", "st', '{"stage": "rloo"', '{"stage": "r\xff'])
def test_a_torn_last_line_is_dropped_on_resume_and_ignored_by_a_reader(tmp_path: Path, torn: str) -> None:
    write_steps(tmp_path, "rloo", resume_step=0, last_step=3)
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(torn.encode("latin-1"))
    assert steps_of(tmp_path, "rloo") == [1, 2, 3]
    write_steps(tmp_path, "rloo", resume_step=3, last_step=4)
    assert steps_of(tmp_path, "rloo") == [1, 2, 3, 4]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 4


def test_a_complete_last_line_without_its_newline_is_kept(tmp_path: Path) -> None:
    write_steps(tmp_path, "rloo", resume_step=0, last_step=3)
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text().rstrip("\n"))
    write_steps(tmp_path, "rloo", resume_step=3, last_step=4)
    assert steps_of(tmp_path, "rloo") == [1, 2, 3, 4]


def test_a_sigkill_between_two_lines_loses_nothing(tmp_path: Path) -> None:
    script = (
        "import os, signal, sys; from pathlib import Path; from rm_robust.runs.metrics import MetricsWriter\n"
        "writer = MetricsWriter(Path(sys.argv[1]), 'sft', 0)\n"
        "for step in (1, 2, 3): writer.write(step, {'sft/loss': 1.0})\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", script, str(tmp_path)], timeout=120).returncode == -9
    assert steps_of(tmp_path, "sft") == [1, 2, 3]


def test_a_malformed_line_in_the_middle_is_an_error_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"stage": "sft", "step": 1}\nnot json\n{"stage": "sft", "step": 2}\n')
    with pytest.raises(DataError, match="line 2"):
        read_metrics(tmp_path, "sft")


def test_a_run_without_metrics_reads_as_empty(tmp_path: Path) -> None:
    assert read_metrics(tmp_path, "sft") == []


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_is_an_error_that_names_the_key_and_writes_nothing(
    tmp_path: Path, value: float
) -> None:
    with (
        MetricsWriter(tmp_path, "rloo", 0) as writer,
        pytest.raises(RmRobustError, match="step 1: metric 'rloo/kl_mean'"),
    ):
        writer.write(1, {"rloo/proxy_score_mean": 1.0, "rloo/kl_mean": value})
    assert read_metrics(tmp_path, "rloo") == []


@pytest.mark.parametrize(
    "metrics",
    [{"loss": 1.0}, {"rloo/": 1.0}, {"a/b/c/d": 1.0}, {"a//c": 1.0}, {"rloo/loss": None}, {"rloo/loss": True}],
)
def test_a_key_without_area_or_a_value_that_is_no_number_is_refused(tmp_path: Path, metrics: dict[str, float]) -> None:
    with MetricsWriter(tmp_path, "rloo", 0) as writer, pytest.raises(AssertionError):
        writer.write(1, metrics)


def test_a_step_before_the_resume_step_is_refused(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path, "rloo", 3) as writer, pytest.raises(AssertionError, match="already committed"):
        writer.write(2, {"rloo/kl_mean": 0.0})


def test_tensorboard_shows_each_resumed_step_once(tmp_path: Path) -> None:
    write_steps(tmp_path, "sft", resume_step=0, last_step=5)
    write_steps(tmp_path, "sft", resume_step=3, last_step=6)
    events = EventAccumulator(str(tmp_path / "tensorboard" / "sft"))
    events.Reload()
    scalars = events.Scalars("sft/loss")
    assert [event.step for event in scalars] == [1, 2, 3, 4, 5, 6]
    assert scalars[3].value == pytest.approx(0.25)


def test_importing_tracking_does_not_import_torch() -> None:
    code = "import sys, rm_robust.runs.metrics; sys.exit('torch' in sys.modules or 'tensorboard' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_json_is_replaced_as_a_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    write_json_atomic(path, {"value": 1})
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json_atomic(path, {"value": math.nan})
    assert json.loads(path.read_text()) == {"value": 1}
    write_json_atomic(path, {"value": "né"})
    assert json.loads(path.read_text()) == {"value": "né"}
    assert [entry.name for entry in tmp_path.iterdir()] == ["summary.json"]


def test_full_storage_ends_a_stage_with_one_error_that_names_the_file_and_closes_the_rest(tmp_path: Path) -> None:
    class Sink:
        is_closed = False

        def write(self, step: int, metrics: Mapping[str, int | float]) -> None: ...

        def close(self) -> None:
            self.is_closed = True

    sink = Sink()

    def train() -> None:
        with MetricsWriter(tmp_path, "sft", 0, sinks=[sink]) as writer, files_of_at_most(4096):
            for step in range(1, 100):
                writer.write(step, {"sft/loss": 0.5})

    with pytest.raises(
        StorageError, match=rf"^{tmp_path}/metrics.jsonl could not be written: File too large.*Make room"
    ) as raised:
        train()
    assert sink.is_closed
    assert isinstance(raised.value.__cause__, OSError)
    num_kept = len(steps_of(tmp_path, "sft"))
    assert 0 < num_kept < 99
    write_steps(tmp_path, "sft", resume_step=num_kept, last_step=100)
    assert steps_of(tmp_path, "sft") == list(range(1, 101))


def test_a_text_that_does_not_fit_leaves_the_one_before_and_nothing_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    write_json_atomic(path, {"value": 1})
    with pytest.raises(StorageError, match=rf"^{path} could not be written: File too large"), files_of_at_most(100):
        write_json_atomic(path, {"value": "x" * 1000})
    assert json.loads(path.read_text()) == {"value": 1}
    assert [entry.name for entry in tmp_path.iterdir()] == ["summary.json"]


def test_every_step_logs_the_same_fields_in_the_same_order(caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("test_tracking")
    keys = ["rloo/gold_score_mean", "rloo/kl_mean", "time/step_s"]
    with caplog.at_level(logging.INFO, logger="test_tracking"):
        log_step(
            logger, "rloo", 1, 40, {"time/step_s": 2.25, "rloo/gold_score_mean": 0.123456, "rloo/kl_mean": 0}, keys
        )
        log_step(logger, "rloo", 2, 40, {"rloo/gold_score_mean": 1.0, "rloo/reward_mean": 9.0}, keys)
    assert caplog.messages == [
        "rloo step 1/40 gold_score_mean=0.1235 kl_mean=0 time/step_s=2.25",
        "rloo step 2/40 gold_score_mean=1 kl_mean=- time/step_s=-",
    ]
