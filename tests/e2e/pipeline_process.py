"""Start pipelines as a person does: each is a subprocess with its own session, run directory and Ray folder.

Processes are ended by process id only.
"""

import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
SMOKE_CONFIG = "pipelines/configs/smoke.toml"
STAGE_DEADLINE_S = 300
"""Seconds for one stage on a busy machine. On a quiet one, a stage takes about half a minute."""
RUN_DEADLINE_S = 900
EXIT_DEADLINE_S = 150
"""Seconds for all processes to end.

Ray kills a raylet that needs over a second to stop. Its dashboard agent notices that after 10 s, and then tries for 60
s to reach the GCS, which has ended.
"""
POLL_EVERY_S = 0.02


def clean_environment(ray_dir: Path) -> dict[str, str]:
    """Return this process's environment without its settings for Ray and for this project.

    It has a new token for Ray, so that nothing depends on ~/.ray.
    """
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "RM_ROBUST_"))}
    path = f"{Path(sys.executable).parent}{os.pathsep}{kept['PATH']}"
    return kept | {
        "PATH": path,
        "RAY_TMPDIR": str(ray_dir),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_USAGE_STATS_ENABLED": "0",
    }


@dataclass
class Running:
    """A started command. `session` is its process id: everything that it starts stays in that session, also Ray."""

    process: subprocess.Popen[bytes]
    output_path: Path

    @property
    def session(self) -> int:
        return self.process.pid

    def output(self) -> str:
        return self.output_path.read_text(errors="replace")

    def wait(self, deadline_s: float = RUN_DEADLINE_S) -> int:
        """Wait until no process of the session is left, and return the exit status."""
        wait_until(
            lambda: self.process.poll() is not None,
            deadline_s,
            lambda: f"{self.process.args} still runs:\n{self.output()[-4000:]}",
        )
        self.wait_for_empty_session()
        return self.process.returncode

    def wait_for_empty_session(self) -> None:
        wait_until(
            lambda: not session_processes(self.session),
            EXIT_DEADLINE_S,
            lambda: f"left behind by {self.process.args}: {session_processes(self.session)}",
        )

    def wait_for_file(self, folder: Path, pattern: str, deadline_s: float = STAGE_DEADLINE_S) -> None:
        """Wait until `folder` holds a file that matches `pattern`. Fails at once if the command ends before that."""

        def found() -> bool:
            ended = self.process.poll() is not None
            assert any(folder.glob(pattern)) or not ended, (
                f"ended with {self.process.returncode} before {folder}/{pattern} existed:\n{self.output()[-4000:]}"
            )
            return any(folder.glob(pattern))

        wait_until(found, deadline_s, lambda: f"no {folder}/{pattern}:\n{self.output()[-4000:]}")

    def kill(self) -> None:
        """Send SIGKILL to everything at once, as when the machine is lost.

        If only the driver were killed, workers would go on for two or three seconds.
        """
        os.killpg(self.process.pid, signal.SIGKILL)
        self.clean_up()
        self.wait_for_empty_session()

    def clean_up(self) -> list[str]:
        """End what is left of the session by process id, and return its commands."""
        left_behind = session_processes(self.session)
        for pid in left_behind:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self.process.wait()
        return list(left_behind.values())


def start(command: list[str], *, environment: dict[str, str], output_path: Path) -> Running:
    """Start `command` at the repository's root in a new session, with both outputs in one file."""
    with output_path.open("wb") as output:
        process = subprocess.Popen(
            command,
            cwd=REPOSITORY,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    return Running(process, output_path)


def session_processes(session: int) -> dict[int, str]:
    """Return the command of every living process in a session, by process id."""
    processes: dict[int, str] = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            _, _, after_name = (entry / "stat").read_text().rpartition(")")
            state, _, _, session_id = after_name.split()[:4]
            if int(session_id) == session and state not in "ZX":
                processes[int(entry.name)] = (
                    (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")[:200]
                )
        except OSError:
            continue  # it ended meanwhile
    return processes


def wait_until(condition: Callable[[], bool], deadline_s: float, describe: Callable[[], str]) -> None:
    """Poll until `condition()` is true. Raises AssertionError with `describe()` after `deadline_s`."""
    ends_at = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < ends_at, f"not within {deadline_s:.0f} s: {describe()}"
        time.sleep(POLL_EVERY_S)
