"""Start `python -m serve` as a process with its own Ray, and find the processes of a model's replicas."""

import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

from rm_robust.cluster.environment import free_port
from tests.e2e.pipeline_process import Running, clean_environment, session_processes, start, wait_until

UP_WITHIN_S = 180.0


@dataclass(frozen=True)
class ServeProcess:
    url: str
    running: Running

    def is_ready(self) -> bool:
        assert self.running.process.poll() is None, self.running.output()[-4000:]
        try:
            return httpx.get(f"{self.url}/readyz", timeout=10, trust_env=False).status_code == 200
        except httpx.TransportError:
            return False


@contextmanager
def serve_process(folder: Path, *arguments: str) -> Iterator[ServeProcess]:
    """Start the service and wait until it is ready. When the block ends, kill what is left of its session.

    The output goes to `folder`/output.txt.
    """
    ray_dir = Path(tempfile.mkdtemp(prefix="rsp"))  # short: Ray puts Unix sockets below it
    port = free_port("127.0.0.1")
    command = [sys.executable, "-m", "serve", *arguments, "--port", str(port)]
    process = ServeProcess(
        f"http://127.0.0.1:{port}",
        start(command, environment=clean_environment(ray_dir) | {"PYTHONPATH": "."}, output_path=folder / "output.txt"),
    )
    try:
        wait_until(process.is_ready, UP_WITHIN_S, lambda: process.running.output()[-4000:])
        yield process
    finally:
        process.running.clean_up()
        shutil.rmtree(ray_dir, ignore_errors=True)


def replica_process_ids(session: int, model_name: str) -> set[int]:
    """Return the process ids of one model's replicas, except those that Serve has started but not named yet."""
    named = re.compile(rf"ray::ServeReplica:{re.escape(model_name)}:")
    return {process_id for process_id, command in session_processes(session).items() if named.match(command)}
