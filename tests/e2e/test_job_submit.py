"""The README's job, word for word: Ray started in one terminal, the pipeline submitted from another, its driver killed, the same submit again."""

import json
import os
import signal
from pathlib import Path

import pytest

from rm_robust.training_state import committed_steps
from tests.e2e.pipeline_process import RUN_DEADLINE_S
from tests.e2e.ray_cluster import descendants, ray_cluster
from tests.e2e.test_kill_and_resume import check_resumed, lines_of

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3 * RUN_DEADLINE_S)]

NUM_RLOO_STEPS = 12
"""As in smoke.toml."""


def test_a_job_whose_driver_was_killed_resumes_when_it_is_submitted_again(tmp_path: Path) -> None:
    with ray_cluster(tmp_path, "ray start --head --block") as cluster:
        run_dir = cluster.run_root / "smoke"
        first = cluster.submit()
        first.wait_for_file(run_dir / "rloo" / "state", "step-*", RUN_DEADLINE_S)
        drivers = cluster.drivers()
        assert len(drivers) == 1, descendants(cluster.head.session)
        os.kill(drivers[0], signal.SIGKILL)
        assert first.wait() != 0
        before = lines_of(run_dir, "rloo")
        committed = committed_steps(run_dir / "rloo" / "state")[-1]

        second = cluster.submit()
        assert second.wait() == 0, second.output()[-4000:]
        assert second.output().count("already committed, skipped") == 4
        assert f"report: {run_dir}/report.html" in second.output()
        check_resumed(run_dir, "rloo", before, committed, num_steps=NUM_RLOO_STEPS)
        assert json.loads((run_dir / "stages" / "rloo.json").read_text())["resumed_from_step"] == committed
