"""Workers are copies of one process: each has its client's arguments, environment, folder and output, and its fate."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from rm_robust.cluster import worker_server
from rm_robust.cluster.environment import DRIVER_VARIABLE, this_driver

DEADLINE_S = 60.0
SCRIPT = """
import json, os, sys
import torch
report = {
    "arguments": sys.argv[1:],
    "variable": os.environ.get("MINE"),
    "others": sorted(set(os.environ) - {"MINE", "PATH", "LC_CTYPE", "PWD", "SHLVL", "_"}),
    "folder": os.getcwd(),
    "preloaded_by": os.getppid(),
    "ray": "ray" in sys.modules,
    "path": sys.path[0],
    "threads": torch.get_num_threads(),
    "oom_score": open("/proc/self/oom_score_adj").read().strip(),
    "blocked": [number.name for number in __import__("signal").pthread_sigmask(0, [])],
    "random": [__import__("random").random(), __import__("numpy").random.random()],
}
print(json.dumps(report), flush=True)
print("an error line", file=sys.stderr)
if "wait" in sys.argv:
    __import__("time").sleep(600)
sys.exit(7)
"""


@pytest.fixture(scope="module")
def command() -> Iterator[list[str]]:
    """Start the server of this process, and stop it afterwards."""
    started = worker_server.start()
    if started is None:
        pytest.skip("a machine with a GPU has no worker server")
    yield started.split()
    worker_server.stop()


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "worker.py"
    path.write_text(SCRIPT)
    return path


def client(command: list[str], script: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*command, str(script), *arguments],
        env={"MINE": "a value", "PATH": os.environ["PATH"]},
        cwd=script.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_until_gone(process_id: int) -> None:
    deadline_s = time.monotonic() + DEADLINE_S
    while psutil.pid_exists(process_id) and psutil.Process(process_id).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline_s, f"process {process_id} still runs"
        time.sleep(0.05)


def test_a_worker_is_what_its_client_would_have_been(command: list[str], script: Path) -> None:
    both = [client(command, script, "a b", "--c=d") for _ in range(2)]
    reports = []
    for process in both:
        output, errors = process.communicate(timeout=DEADLINE_S)
        assert (process.returncode, errors) == (7, "an error line\n")
        reports.append(json.loads(output))
    assert reports[0].pop("random") != reports[1].pop("random")
    assert reports[0] == reports[1]
    server_id = reports[0].pop("preloaded_by")
    assert psutil.Process(server_id).ppid() == os.getpid()
    assert reports[0] == {
        "arguments": ["a b", "--c=d"],
        "variable": "a value",
        "others": [],
        "folder": str(script.parent),
        "ray": False,
        "path": str(script.parent),
        "threads": 1,
        "oom_score": "1000",
        "blocked": ["SIGINT"],
    }


def test_a_worker_ends_with_its_client_and_the_server_goes_on(command: list[str], script: Path) -> None:
    waiting = client(command, script, "wait")
    assert waiting.stdout is not None
    waiting.stdout.readline()
    (worker,) = [
        process
        for process in psutil.Process().children(recursive=True)
        if process.pid != waiting.pid and process.ppid() != os.getpid()
    ]
    waiting.kill()
    wait_until_gone(worker.pid)
    assert client(command, script).wait(DEADLINE_S) == 7


def test_a_worker_and_its_client_that_end_together_leave_the_server_whole(command: list[str], script: Path) -> None:
    waiting = client(command, script, "wait")
    assert waiting.stdout is not None
    waiting.stdout.readline()
    (server,) = [process for process in psutil.Process().children() if process.pid != waiting.pid]
    (worker,) = server.children()
    server.suspend()
    worker.kill()
    waiting.kill()
    waiting.wait()
    server.resume()
    assert client(command, script).wait(DEADLINE_S) == 7


def test_without_its_server_a_client_starts_its_worker_as_usual(command: list[str], script: Path) -> None:
    *python, _ = command
    process = client([*python, "rm_robust-of-nobody"], script)
    output, _ = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 7
    assert json.loads(output)["preloaded_by"] == os.getpid()


def test_a_killed_worker_is_reported_as_its_client(command: list[str], script: Path) -> None:
    waiting = client(command, script, "wait")
    assert waiting.stdout is not None
    waiting.stdout.readline()
    for process in psutil.Process().children(recursive=True):
        if process.pid != waiting.pid and process.ppid() != os.getpid():
            process.kill()
    assert waiting.wait(DEADLINE_S) == 128 + signal.SIGKILL


def test_an_actor_whose_libraries_read_variables_when_loaded_is_started_as_usual(command: list[str]) -> None:
    del command
    assert worker_server.runtime_env_of({"A": "1"}) == {"env_vars": {"A": "1"}, "py_executable": sys.executable}


def test_the_server_counts_as_the_drivers_and_ends_with_it(tmp_path: Path) -> None:
    """Also when the driver is killed."""
    driver = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import time; from rm_robust.cluster import worker_server; worker_server.start(); "
            "print(worker_server._server.pid, worker_server.this_driver(), flush=True); time.sleep(600)",
        ],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert driver.stdout is not None
    server_id, _, name = driver.stdout.readline().strip().partition(" ")
    assert psutil.Process(int(server_id)).environ()[DRIVER_VARIABLE] == name != this_driver()
    driver.kill()
    driver.wait()
    wait_until_gone(int(server_id))


def test_without_a_server_nothing_changes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    gpu = tmp_path / "nvidiactl"
    gpu.touch()
    monkeypatch.setattr(worker_server, "GPU_DEVICE", gpu)
    monkeypatch.setattr(worker_server, "_command", None)
    assert worker_server.start() is None
    assert worker_server.runtime_env_of({"A": "1"}) == {"env_vars": {"A": "1"}}
