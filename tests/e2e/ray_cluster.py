"""Ray as docs/cluster/ starts it, with a test's own ports: a head, workers on the same machine, and submitted jobs."""

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
"""The number of RLOO steps in smoke.toml."""


def documented_command(beginning: str) -> list[str]:
    """Return the one line of the pages of docs/cluster/ that begins with `beginning`, as arguments."""
    text = "\n".join(page.read_text() for page in sorted((REPOSITORY / "docs" / "cluster").glob("*.md")))
    lines = re.findall(rf"^{re.escape(beginning)}.*$", text, re.MULTILINE)
    assert len(lines) == 1, f"the pages of docs/cluster/ have {lines} for {beginning!r}"
    return shlex.split(lines[0])


def free_ports(count: int) -> list[str]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for bound in sockets:
            bound.bind(("127.0.0.1", 0))
        return [str(bound.getsockname()[1]) for bound in sockets]


@dataclass
class Cluster:
    """A head and workers, each in a session of its own.

    `gcs_address` is the value of RAY_ADDRESS on a node, and `dashboard` its value for submitting a job.
    """

    launcher: Launcher
    head: Running
    gcs_address: str
    dashboard: str
    run_root: Path
    workers: list[Running] = field(default_factory=list)

    def add_worker(self, *options: str, within: Sequence[str] = ()) -> Running:
        """Start a worker with `options`, and wait until it is up. The command `within`, if given, runs it."""
        address, agent_port = f"--address={self.gcs_address}", free_ports(1)[0]
        command = [
            address if part.startswith("--address=") else part
            for part in documented_command("ray start --address=HEAD:6379")
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

        # Two workers that start at the same time on one machine would take each other's ports.
        wait_until(is_up, STAGE_DEADLINE_S, worker.output)
        return worker

    def submit(self, *arguments: str) -> Running:
        command = documented_command(
            "ray job submit --working-dir . -- python pipelines/full_rlhf.py --config pipelines/configs/smoke.toml"
        )
        return self.ray(*command[1:], *arguments)

    def submit_in_place(self, *arguments: str) -> Running:
        """Submit without an upload, as the shorter form in docs/cluster/jobs.md: the job runs in the checkout.

        Each raylet of this machine would unpack an upload in the same place again, and take the working directory away
        from the processes of the others.
        """
        return self.ray("job", "submit", "--", "python", "pipelines/full_rlhf.py", "--config", SMOKE_CONFIG, *arguments)

    def submit_script(self, script: str, *settings: str) -> Running:
        """Submit another pipeline on smoke.toml."""
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
        """Run Ray's command line as from a machine outside the cluster."""
        return self.launcher.command("ray", *arguments, environment={"RAY_ADDRESS": self.dashboard})

    def states_of(self, kind: str) -> list[dict[str, Any]]:
        """Return what `ray list nodes`, actors or tasks prints, with all details."""
        listing = self.ray("list", kind, "--format=json", "--detail", "--limit=10000")
        assert listing.wait() == 0, listing.output()
        states: list[dict[str, Any]] = json.loads(listing.output().splitlines()[-1])
        return states

    def served(self) -> list[str]:
        """Return the living actors of Ray Serve, with its controller, and those that keep a run's service."""
        return [
            a["class_name"]
            for a in self.states_of("actors")
            if a["state"] == "ALIVE" and re.match("Serve|Keeper", a["class_name"])
        ]

    def drivers(self) -> list[int]:
        """Return the process ids of the job's Python process below this head, without the job's shell."""
        below = descendants(self.head.session)
        return [
            pid
            for pid, command in below.items()
            if "pipelines/full_rlhf.py" in command and not command.startswith("/bin/sh")
        ]

    def wait_until_it_answers(self) -> None:
        """Wait until the job server answers, which is a little after `ray start` says that Ray runs."""

        def answers() -> bool:
            assert self.head.process.poll() is None, self.head.output()
            return self.ray("job", "list").wait(STAGE_DEADLINE_S) == 0

        wait_until(answers, STAGE_DEADLINE_S, self.head.output)

    def stop(self) -> None:
        """Stop the cluster as Ctrl-C does, and fail if a process stays behind."""
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
    """Start a cluster of a head alone, with the line of docs/cluster/ that begins with `head_command`.

    The token is the one that deploy/ray_environment.sh makes. Runs go to `folder`/runs.
    """
    run_root, home = folder / "runs", folder / "home"
    launcher = Launcher(folder)
    del launcher.environment["RAY_AUTH_TOKEN"]
    launcher.environment |= {
        "RM_ROBUST_RUN_ROOT": str(run_root),
        "HOME": str(home),
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
    }
    if not home.exists():  # a test's second cluster uses the home of the first
        home.mkdir()
        # `make` does nothing here, because what it would install is already there.
        sourced = launcher.command(
            "bash", "-c", 'make() { true; }; . deploy/ray_environment.sh "$0" && env', str(run_root)
        )
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
        *documented_command(head_command),
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
        cluster.gcs_address = pattern.findall(head.output())[0]  # Ray always uses the machine's own address
        yield cluster
        cluster.stop()
    finally:
        launcher.close()


def kill_the_driver_and_submit_again(cluster: Cluster) -> Running:
    """Submit the smoke job, kill its driver in RLOO, submit it again, and return the second submit.

    The second one must succeed, and end as if the first had never been killed.
    """
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
    # Every raylet of a machine prints the node's log, so a line may come several times.
    skipped = re.findall(r"stage (\w+): already committed, skipped", second.output())
    assert set(skipped) == {"sft", "preferences", "reward_model", "evaluation"}
    assert f"report: {run_dir}/report.html" in second.output()
    check_resumed(run_dir, "rloo", before, committed, num_steps=NUM_RLOO_STEPS)
    assert json.loads((run_dir / "stages" / "rloo.json").read_text())["resumed_from_step"] == committed
    return second


def descendants(pid: int) -> dict[int, str]:
    """Return the commands of all descendants of `pid`, by process id.

    Sessions would not do: a job's driver has a session of its own.
    """
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
    commands: dict[int, str] = {}
    frontier = {pid}
    while frontier:
        frontier = {child for child, (parent, _) in parents.items() if parent in frontier}
        commands |= {child: parents[child][1] for child in frontier}
    return commands


def alive(processes: dict[int, str]) -> dict[int, str]:
    """Return those processes that still run under the same command, because a process id can be used again."""
    living = {}
    for pid, command in processes.items():
        try:
            if (
                command
                and (Path("/proc") / str(pid) / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                == command
            ):
                living[pid] = command
        except OSError:
            continue
    return living
