"""Ctrl-C ends a run at any stage: one line, status 130 within seconds, and the same command goes on."""

import signal
import time
from pathlib import Path

import pytest

from tests.e2e.conftest import WITH_TWIN, Launcher, SmokeRun
from tests.e2e.pipeline_process import RUN_DEADLINE_S, SMOKE_CONFIG, STAGE_DEADLINE_S, wait_until
from tests.e2e.test_kill_and_resume import copy_as_before

pytestmark = pytest.mark.timeout(2 * RUN_DEADLINE_S)

ENDS_WITHIN_S = 10.0


@pytest.mark.parametrize(
    ("stage", "text", "number"),
    [
        pytest.param("sft", "sft step 3/", signal.SIGINT, id="ray_train"),
        pytest.param("preferences", "stage preferences: begins", signal.SIGTERM, id="ray_data"),
        pytest.param("reward_model", "rloo step 2/", signal.SIGINT, id="rloo_after_ray_train"),
    ],
)
def test_a_signal_ends_the_run_within_seconds_and_the_same_command_goes_on(
    stage: str, text: str, number: signal.Signals, smoke_run: SmokeRun, launcher: Launcher, tmp_path: Path
) -> None:
    """`stage` is the first one of the run; the signal comes when its log has `text`."""
    run_dir = tmp_path / "run"
    copy_as_before(stage, smoke_run, run_dir)
    arguments = ("full_rlhf.py", "--config", SMOKE_CONFIG, "--run-dir", str(run_dir), WITH_TWIN)
    running = launcher.pipeline(*arguments)

    def is_at_work() -> bool:
        assert running.process.poll() is None, running.output()[-4000:]
        return any(text in log.read_text() for log in run_dir.glob("logs/*.log"))

    wait_until(is_at_work, STAGE_DEADLINE_S, running.output)
    running.process.send_signal(number)
    signalled_s = time.monotonic()
    assert running.wait() == 128 + number, running.output()[-4000:]
    assert time.monotonic() - signalled_s < ENDS_WITHIN_S
    assert running.output().count("The same command goes on from the last committed state.") == 1
    assert "Traceback" not in running.output()
    assert not (run_dir / "stages" / "rloo.json").exists()
