"""The README's job, word for word: Ray started in one terminal, the pipeline submitted from another, its driver killed, the same submit again."""

import json
import os
import re
import shlex
import signal
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from rm_robust.training_state import committed_steps
from tests.e2e.conftest import Launcher
from tests.e2e.pipeline_process import EXIT_DEADLINE_S, REPOSITORY, RUN_DEADLINE_S, STAGE_DEADLINE_S, Running, wait_until
from tests.e2e.test_kill_and_resume import check_resumed, lines_of

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3 * RUN_DEADLINE_S)]

NUM_RLOO_STEPS = 12
"""As in smoke.toml."""


def readme_command(beginning: str) -> list[str]:
    """The one line of README.md that starts so."""
    lines = re.findall(rf"^{re.escape(beginning)}.*$", (REPOSITORY / "README.md").read_text(), re.MULTILINE)
    assert len(lines) == 1, f"README.md has {lines} for {beginning!r}"
    return shlex.split(lines[0])


def free_ports(count: int) -> list[str]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [str(each.getsockname()[1]) for each in sockets]


@dataclass(frozen=True)
class Head:
    """`ray start --head --block` with its own ports, and the variables that send a submit there."""

    launcher: Launcher
    running: Running
    address: str
    run_dir: Path

    def submit(self) -> Running:
        command = readme_command("ray job submit --working-dir . -- python pipelines/full_rlhf.py")
        return self.launcher.command(*command, environment={"RAY_ADDRESS": self.address})

    def drivers(self) -> list[int]:
        """Process ids of the job's python, found below this head only (the job's shell comes first)."""
        below = descendants(self.running.session)
        return [pid for pid, command in below.items() if "pipelines/full_rlhf.py" in command and not command.startswith("/bin/sh")]


@pytest.fixture
def head(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Head]:
    run_root = tmp_path / "runs"
    launcher = Launcher(tmp_path)
    launcher.environment |= {"RM_ROBUST_RUN_ROOT": str(run_root), "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0"}
    port, dashboard_port, client_port, agent_port = free_ports(4)
    ports = ["--port", port, "--dashboard-port", dashboard_port, "--ray-client-server-port", client_port, "--dashboard-agent-listen-port", agent_port]
    running = launcher.command(*readme_command("ray start --head --block"), *ports, "--min-worker-port=0", "--max-worker-port=0")
    try:
        yield Head(launcher, running, f"http://127.0.0.1:{dashboard_port}", run_root / "smoke")
        everything = descendants(running.session)
        running.process.send_signal(signal.SIGTERM)
        running.process.wait(EXIT_DEADLINE_S)
        running.wait_for_empty_session()
        wait_until(lambda: not alive(everything), EXIT_DEADLINE_S, lambda: f"left behind: {alive(everything)}")
    finally:
        launcher.close()


def descendants(pid: int) -> dict[int, str]:
    """Process id -> command of `pid`'s children, their children, and so on: a job's driver has a session of its own."""
    parents: dict[int, tuple[int, str]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                parents[int(entry.name)] = (parent, (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace"))
            except OSError:
                continue  # it ended meanwhile
    found: dict[int, str] = {}
    frontier = {pid}
    while frontier:
        frontier = {child for child, (parent, _) in parents.items() if parent in frontier}
        found |= {child: parents[child][1] for child in frontier}
    return found


def alive(processes: dict[int, str]) -> dict[int, str]:
    """Those still there under the same command (a process id can be given out again)."""
    found = {}
    for pid, command in processes.items():
        try:
            if command and (Path("/proc") / str(pid) / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace") == command:
                found[pid] = command
        except OSError:
            continue
    return found


def wait_for_head(head: Head) -> None:
    """The job server answers a little after `ray start` says that Ray runs."""

    def answers() -> bool:
        assert head.running.process.poll() is None, head.running.output()
        return head.launcher.command("ray", "job", "list", environment={"RAY_ADDRESS": head.address}).wait(STAGE_DEADLINE_S) == 0

    wait_until(answers, STAGE_DEADLINE_S, head.running.output)


def test_a_job_whose_driver_was_killed_resumes_when_it_is_submitted_again(head: Head) -> None:
    wait_for_head(head)
    first = head.submit()
    first.wait_for_file(head.run_dir / "rloo" / "state", "step-*", RUN_DEADLINE_S)
    drivers = head.drivers()
    assert len(drivers) == 1, descendants(head.running.session)
    os.kill(drivers[0], signal.SIGKILL)
    assert first.wait() != 0
    before = lines_of(head.run_dir, "rloo")
    committed = committed_steps(head.run_dir / "rloo" / "state")[-1]

    second = head.submit()
    assert second.wait() == 0, second.output()[-4000:]
    assert second.output().count("already committed, skipped") == 4
    assert f"report: {head.run_dir}/report.html" in second.output()
    check_resumed(head.run_dir, "rloo", before, committed, num_steps=NUM_RLOO_STEPS)
    assert json.loads((head.run_dir / "stages" / "rloo.json").read_text())["resumed_from_step"] == committed
