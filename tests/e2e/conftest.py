"""Start pipelines for the end-to-end tests, check that they leave no process behind, and share one smoke run."""

import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.e2e.pipeline_process import SMOKE_CONFIG, Running, clean_environment, start


class Launcher:
    """Start commands with one Ray folder and one Ray token. Their outputs go to `output_dir`."""

    def __init__(self, output_dir: Path) -> None:
        self.output_dir = output_dir
        self.ray_dir = Path(tempfile.mkdtemp(prefix="rme", dir="/tmp"))  # a short name: Ray puts Unix sockets below it
        self.environment = clean_environment(self.ray_dir)
        self.started: list[Running] = []

    def command(self, *command: str, environment: dict[str, str] | None = None) -> Running:
        output_path = self.output_dir / f"output-{len(self.started)}.txt"
        running = start(list(command), environment=self.environment | (environment or {}), output_path=output_path)
        self.started.append(running)
        return running

    def pipeline(self, script: str, *arguments: str, environment: dict[str, str] | None = None) -> Running:
        return self.command(sys.executable, f"pipelines/{script}", *arguments, environment=environment)

    def close(self) -> None:
        """End all processes that are left, and fail if there were any: a test that ended well leaves none."""
        left_behind = [command for running in self.started for command in running.clean_up()]
        shutil.rmtree(self.ray_dir)
        assert not left_behind, f"processes left behind: {left_behind}"


@dataclass(frozen=True)
class SmokeRun:
    """A finished run of smoke.toml."""

    run_dir: Path
    exit_status: int
    output: str


WITH_TWIN = "--set=reward_model.bt_twin=true"


@pytest.fixture
def launcher(tmp_path: Path) -> Iterator[Launcher]:
    launched = Launcher(tmp_path)
    yield launched
    launched.close()


@pytest.fixture(scope="session")
def smoke_run(tmp_path_factory: pytest.TempPathFactory) -> SmokeRun:
    """Run smoke.toml once. Tests may only read the run, because many tests share it."""
    folder = tmp_path_factory.mktemp("smoke")
    launched = Launcher(folder)
    try:
        running = launched.pipeline(
            "full_rlhf.py", "--config", SMOKE_CONFIG, "--run-dir", str(folder / "run"), WITH_TWIN
        )
        exit_status = running.wait()
    finally:
        launched.close()
    return SmokeRun(folder / "run", exit_status, running.output())
