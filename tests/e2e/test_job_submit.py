"""The job of docs/cluster/jobs.md, word for word: its driver is killed, and the same submit resumes it."""

from pathlib import Path

import pytest

from tests.e2e.pipeline_process import RUN_DEADLINE_S
from tests.e2e.ray_cluster import kill_the_driver_and_submit_again, ray_cluster

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3 * RUN_DEADLINE_S)]


def test_a_job_whose_driver_was_killed_resumes_when_it_is_submitted_again(tmp_path: Path) -> None:
    with ray_cluster(tmp_path, "ray start --head --block") as cluster:
        kill_the_driver_and_submit_again(cluster)
