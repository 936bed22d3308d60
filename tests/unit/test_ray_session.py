"""What is left of a local Ray's workers is ended with it, and nothing else is."""

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from rm_robust.ray_session import DRIVER_VARIABLE, shut_down, workers_of

STUBBORN = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(120)"


def worker_of(driver: str) -> subprocess.Popen[str]:
    """A process that does not end by itself."""
    worker = subprocess.Popen([sys.executable, "-c", STUBBORN], env=os.environ | {DRIVER_VARIABLE: driver}, stdout=subprocess.PIPE, text=True)
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
    monkeypatch.setattr("rm_robust.ray_session.WORKERS_END_S", 0.2)
    own, other = workers
    assert [process.pid for process in workers_of(f"own {os.getpid()}")] == [own.pid]
    shut_down(f"own {os.getpid()}")
    assert own.wait(10) < 0
    assert other.poll() is None
    assert f"killing process {own.pid}" in caplog.text


def test_workers_that_end_by_themselves_are_only_waited_for(workers: list[subprocess.Popen[str]], caplog: pytest.LogCaptureFixture) -> None:
    own, _ = workers
    own.kill()
    own.wait(10)
    shut_down(f"own {os.getpid()}")
    assert "killing" not in caplog.text
