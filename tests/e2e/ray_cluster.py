"""Ray as the README starts it, with ports of a test's own: a head, workers beside it on the same machine, and jobs submitted to it."""

import json
import os
import re
import shlex
import signal
import socket
import stat
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rm_robust.training.state import committed_steps
from tests.e2e.conftest import Launcher
from tests.e2e.pipeline_process import (
    EXIT_DEADLINE_S,
    REPOSITORY,
    RUN_DEADLINE_S,
    SMOKE_CONFIG,
    STAGE_DEADLINE_S,
    Running,
    wait_until,
)
from tests.e2e.test_kill_and_resume import check_resumed, lines_of

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


@dataclass
class Cluster:
    """A head in a session of its own, and workers in theirs. `gcs_address` is what RAY_ADDRESS says on a node, `dashboard` what it says to submit a job."""

    launcher: Launcher
    head: Running
    gcs_address: str
    dashboard: str
    run_root: Path
    workers: list[Running] = field(default_factory=list)

    def add_worker(self, *options: str, within: Sequence[str] = ()) -> Running:
        """`within`: a command that runs the one which follows it."""
        address, agent_port = f"--address={self.gcs_address}", free_ports(1)[0]
        command = [
            address if part.startswith("--address=") else part
            for part in readme_command("ray start --address=HEAD:6379")
        ]
        worker = self.launcher.command(
            *within,
            *command,
            "--dashboard-agent-listen-port",
            agent_port,
            "--min-worker-port=0",
            "--max-worker-port=0",
            *options,
        )
        self.workers.append(worker)

        def is_up() -> bool:
            assert worker.process.poll() is None, worker.output()
            return "Ray runtime started" in worker.output()

        wait_until(
            is_up, STAGE_DEADLINE_S, worker.output
        )  # two that start at once on one machine take each other's ports
        return worker

    def submit(self, *arguments: str) -> Running:
        command = readme_command(
            "ray job submit --working-dir . -- python pipelines/full_rlhf.py --config pipelines/configs/smoke.toml"
        )
        return self.ray(*command[1:], *arguments)

    def submit_in_place(self, *arguments: str) -> Running:
        """Without an upload, as README's bare form: the job runs in the checkout. Raylets of one machine would unpack an upload in one place, each
        anew, and take the working directory away below processes of the others."""
        return self.ray("job", "submit", "--", "python", "pipelines/full_rlhf.py", "--config", SMOKE_CONFIG, *arguments)

    def submit_script(self, script: str, *settings: str) -> Running:
        """Another pipeline on smoke.toml."""
        overrides = (part for setting in settings for part in ("--set", setting))
        return self.ray(
            "job",
            "submit",
            "--working-dir",
            ".",
            "--",
            "python",
            f"pipelines/{script}",
            "--config",
            SMOKE_CONFIG,
            *overrides,
        )

    def ray(self, *arguments: str) -> Running:
        """Ray's command line, as from a machine outside of the cluster."""
        return self.launcher.command("ray", *arguments, environment={"RAY_ADDRESS": self.dashboard})

    def states_of(self, what: str) -> list[dict[str, Any]]:
        """`ray list nodes`, actors or tasks, with all details."""
        listing = self.ray("list", what, "--format=json", "--detail", "--limit=10000")
        assert listing.wait() == 0, listing.output()
        found: list[dict[str, Any]] = json.loads(listing.output().splitlines()[-1])
        return found

    def served(self) -> list[str]:
        """Actors of Ray Serve that are alive, its controller with them, and of what keeps a run's service."""
        return [
            a["class_name"]
            for a in self.states_of("actors")
            if a["state"] == "ALIVE" and re.match("Serve|Keeper", a["class_name"])
        ]

    def drivers(self) -> list[int]:
        """Process ids of the job's python, found below this head only (the job's shell comes first)."""
        below = descendants(self.head.session)
        return [
            pid
            for pid, command in below.items()
            if "pipelines/full_rlhf.py" in command and not command.startswith("/bin/sh")
        ]

    def wait_until_it_answers(self) -> None:
        """The job server answers a little after `ray start` says that Ray runs."""

        def answers() -> bool:
            assert self.head.process.poll() is None, self.head.output()
            return self.ray("job", "list").wait(STAGE_DEADLINE_S) == 0

        wait_until(answers, STAGE_DEADLINE_S, self.head.output)

    def stop(self) -> None:
        """As Ctrl-C does; fails when something stays behind."""
        everything = {
            pid: command for node in (self.head, *self.workers) for pid, command in descendants(node.session).items()
        }
        for node in (*self.workers, self.head):
            if node.process.poll() is None:
                node.process.send_signal(signal.SIGTERM)
            node.process.wait(EXIT_DEADLINE_S)
            node.wait_for_empty_session()
        wait_until(lambda: not alive(everything), EXIT_DEADLINE_S, lambda: f"left behind: {alive(everything)}")


@contextmanager
def ray_cluster(
    folder: Path, head_command: str, *options: str, port: str | None = None, environment: dict[str, str] | None = None
) -> Iterator[Cluster]:
    """A cluster of a head alone, started by the README's line that begins so, with the token that deploy/ray_environment.sh makes. Runs go to `folder`/runs."""
    run_root, home = folder / "runs", folder / "home"
    launcher = Launcher(folder)
    del launcher.environment["RAY_AUTH_TOKEN"]
    launcher.environment |= {
        "RM_ROBUST_RUN_ROOT": str(run_root),
        "HOME": str(home),
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
    }
    if not home.exists():  # a second cluster of a test has the first one's
        home.mkdir()
        sourced = launcher.command(
            "bash", "-c", 'make() { true; }; . deploy/ray_environment.sh "$0" && env', str(run_root)
        )  # what make installs is here
        assert sourced.wait() == 0, sourced.output()
        assert f"RM_ROBUST_RUN_ROOT={run_root}\n" in sourced.output()
        assert stat.S_IMODE((home / ".ray" / "auth_token").stat().st_mode) == 0o600
    port, dashboard_port, client_port, agent_port = [port or free_ports(1)[0], *free_ports(3)]
    ports = [
        "--port",
        port,
        "--dashboard-port",
        dashboard_port,
        "--ray-client-server-port",
        client_port,
        "--dashboard-agent-listen-port",
        agent_port,
    ]
    head = launcher.command(
        *readme_command(head_command),
        *ports,
        "--min-worker-port=0",
        "--max-worker-port=0",
        *options,
        environment=environment,
    )
    cluster = Cluster(launcher, head, "", f"http://127.0.0.1:{dashboard_port}", run_root)
    try:
        cluster.wait_until_it_answers()
        pattern = re.compile(rf"ray start --address='(\S+:{port})'")
        wait_until(lambda: bool(pattern.search(head.output())), STAGE_DEADLINE_S, head.output)
        cluster.gcs_address = pattern.findall(head.output())[0]  # the machine's own address, whatever is asked for
        yield cluster
        cluster.stop()
    finally:
        launcher.close()


def kill_the_driver_and_submit_again(cluster: Cluster) -> Running:
    """The smoke job, its driver killed in RLOO, then the same submit, which must end well and as if never killed; returns the second."""
    run_dir = cluster.run_root / "smoke"
    first = cluster.submit()
    first.wait_for_file(run_dir / "rloo" / "state", "step-*", RUN_DEADLINE_S)
    drivers = cluster.drivers()
    assert len(drivers) == 1, descendants(cluster.head.session)
    os.kill(drivers[0], signal.SIGKILL)
    assert first.wait() != 0
    wait_until(lambda: not cluster.served(), STAGE_DEADLINE_S, lambda: f"still served: {cluster.served()}")
    before = lines_of(run_dir, "rloo")
    committed = committed_steps(run_dir / "rloo" / "state")[-1]
    second = cluster.submit()
    assert second.wait() == 0, second.output()[-4000:]
    assert cluster.served() == []
    skipped = re.findall(
        r"stage (\w+): already committed, skipped", second.output()
    )  # every raylet of a machine prints a node's log
    assert set(skipped) == {"sft", "preferences", "reward_model", "evaluation"}
    assert f"report: {run_dir}/report.html" in second.output()
    check_resumed(run_dir, "rloo", before, committed, num_steps=NUM_RLOO_STEPS)
    assert json.loads((run_dir / "stages" / "rloo.json").read_text())["resumed_from_step"] == committed
    return second


def descendants(pid: int) -> dict[int, str]:
    """Process id -> command of `pid`'s children, their children, and so on: a job's driver has a session of its own."""
    parents: dict[int, tuple[int, str]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                parents[int(entry.name)] = (
                    parent,
                    (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace"),
                )
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
            if (
                command
                and (Path("/proc") / str(pid) / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                == command
            ):
                found[pid] = command
        except OSError:
            continue
    return found
