"""Workers that outlive their local Ray are killed with it, and no other process is."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from rm_robust.cluster.environment import WORKER_ENVIRONMENT, worker_environment
from rm_robust.cluster.session import DRIVER_VARIABLE, make_own_token, shut_down, workers_of

STUBBORN = (
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(120)"
)


def worker_of(driver: str) -> subprocess.Popen[str]:
    """Start a process that does not end by itself."""
    worker = subprocess.Popen(
        [sys.executable, "-c", STUBBORN], env=os.environ | {DRIVER_VARIABLE: driver}, stdout=subprocess.PIPE, text=True
    )
    assert worker.stdout is not None
    assert worker.stdout.readline() == "up\n"
    return worker


@pytest.fixture
def workers() -> Iterator[list[subprocess.Popen[str]]]:
    started = [worker_of(f"own {os.getpid()}"), worker_of(f"other {os.getpid()}")]
    yield started
    for worker in started:
        worker.kill()
        worker.communicate()


def test_workers_that_hang_are_killed_and_those_of_another_driver_are_not(
    workers: list[subprocess.Popen[str]], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("rm_robust.cluster.session.WORKERS_END_S", 0.2)
    ours, other = workers
    assert [process.pid for process in workers_of(f"own {os.getpid()}")] == [ours.pid]
    shut_down(f"own {os.getpid()}")
    assert ours.wait(10) < 0
    assert other.poll() is None
    assert f"killing process {ours.pid}" in caplog.text


def test_workers_that_end_by_themselves_are_only_waited_for(
    workers: list[subprocess.Popen[str]], caplog: pytest.LogCaptureFixture
) -> None:
    ours, _ = workers
    ours.kill()
    ours.wait(10)
    shut_down(f"own {os.getpid()}")
    assert "killing" not in caplog.text


def job_config(variables: dict[str, str]) -> str:
    """Return a job's config as ray/dashboard/modules/job/job_supervisor.py of Ray 2.60 writes it."""
    return json.dumps({"runtime_env": {"env_vars": variables}, "metadata": {}})


def test_workers_get_the_variables_that_their_job_does_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_JOB_CONFIG_JSON_ENV_VAR", "TQDM_DISABLE", "RM_ROBUST_LOG_FORMAT"):
        monkeypatch.delenv(name, raising=False)
    assert worker_environment() == WORKER_ENVIRONMENT
    monkeypatch.setenv("RM_ROBUST_LOG_FORMAT", "json")
    assert worker_environment() == {**WORKER_ENVIRONMENT, "RM_ROBUST_LOG_FORMAT": "json"}
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", job_config({"OTHER": "1"}))
    assert worker_environment() == {**WORKER_ENVIRONMENT, "RM_ROBUST_LOG_FORMAT": "json"}
    job_variables = {"RM_ROBUST_LOG_FORMAT": "json", "TOKENIZERS_PARALLELISM": "true"}
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", job_config(job_variables))
    assert worker_environment() == {
        name: value for name, value in WORKER_ENVIRONMENT.items() if name != "TOKENIZERS_PARALLELISM"
    }


def test_a_local_ray_has_a_token_of_its_own_unless_one_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", "restored at the end of the test")
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", "mine")
    make_own_token()
    assert "RAY_AUTH_TOKEN" not in os.environ
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH")
    make_own_token()
    assert len(os.environ["RAY_AUTH_TOKEN"]) == 64
    monkeypatch.setenv("RAY_AUTH_TOKEN", "mine")
    make_own_token()
    assert os.environ["RAY_AUTH_TOKEN"] == "mine"
