"""Starts pipelines for the end-to-end tests, checks that nothing of them is left, and shares one smoke run."""

import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.e2e.pipeline_process import SMOKE_CONFIG, Running, start


@dataclass
class Launcher:
    """Starts commands with one Ray folder; their outputs go to `output_dir`."""

    ray_dir: Path
    output_dir: Path
    started: list[Running] = field(default_factory=list)

    def command(self, *command: str, environment: dict[str, str] | None = None) -> Running:
        running = start(list(command), ray_dir=self.ray_dir, output_path=self.output_dir / f"output-{len(self.started)}.txt", environment=environment)
        self.started.append(running)
        return running

    def pipeline(self, script: str, *arguments: str, environment: dict[str, str] | None = None) -> Running:
        return self.command(sys.executable, f"pipelines/{script}", *arguments, environment=environment)

    def close(self) -> None:
        """End and name whatever is left: a test that ended well has left nothing."""
        left = [command for running in self.started for command in running.clean_up()]
        shutil.rmtree(self.ray_dir)
        assert not left, f"processes left behind: {left}"


@dataclass(frozen=True)
class SmokeRun:
    """A finished run of smoke.toml."""

    run_dir: Path
    exit_status: int
    output: str


@pytest.fixture
def launcher(tmp_path: Path) -> Iterator[Launcher]:
    launched = new_launcher(tmp_path)
    yield launched
    launched.close()


@pytest.fixture(scope="session")
def smoke_run(tmp_path_factory: pytest.TempPathFactory) -> SmokeRun:
    """Read it, never write to it: many tests share it."""
    folder = tmp_path_factory.mktemp("smoke")
    launched = new_launcher(folder)
    try:
        running = launched.pipeline("full_rlhf.py", "--config", SMOKE_CONFIG, "--run-dir", str(folder / "run"))
        exit_status = running.wait()
    finally:
        launched.close()
    return SmokeRun(folder / "run", exit_status, running.output())


def new_launcher(output_dir: Path) -> Launcher:
    """Its Ray folder has a short name: Ray puts Unix sockets below it."""
    return Launcher(Path(tempfile.mkdtemp(prefix="rme", dir="/tmp")), output_dir)
