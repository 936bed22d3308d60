"""The wheel alone is a light client: `make wheel` builds it, and pip installs it into an empty virtual environment.

It scores against a service of ours that runs in the full environment.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from random import Random

import pytest

from rm_robust.data.world.corpus import distinct_prompts
from rm_robust.data.world.gold_judge import gold_score
from rm_robust.scoring.client import KEY_VARIABLE
from serve.keys import parse_keys
from serve.settings import ModelSettings, ServiceSettings
from tests.support.local_serve import local_ray, local_service

REPOSITORY = Path(__file__).parents[2]
HEAVY = ("torch", "ray", "transformers", "vllm", "deepspeed", "datasets", "pyarrow", "numpy", "scipy", "fastapi")
SCORE_IN_PYTHON = """
import json, sys
from rm_robust.scoring import RewardClient, ScoreInput

url, *lines = sys.argv[1:]
with RewardClient(url) as client:
    print(json.dumps(client.score([ScoreInput(**json.loads(line)) for line in lines]).scores))
"""


@dataclass(frozen=True)
class Installed:
    """The virtual environment that has the wheel, what the wheel depends on, and nothing else."""

    wheel: Path
    bin: Path

    def run(self, *command: str, key: str | None = None) -> subprocess.CompletedProcess[str]:
        return run(str(self.bin / command[0]), *command[1:], folder=self.bin, environment={KEY_VARIABLE: key or ""})

    def prints(self, *command: str, key: str | None = None) -> str:
        """Return what a command prints that ends well."""
        ended = self.run(*command, key=key)
        assert ended.returncode == 0, ended.stderr
        return ended.stdout


def run(*command: str, folder: Path, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run a command with none of this process's settings for Python, make, Ray and this project."""
    unwanted = ("PYTHON", "MAKE", "VIRTUAL_ENV", "RAY_", "RM_ROBUST_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(unwanted)}
    given = {name: value for name, value in (environment or {}).items() if value}
    return subprocess.run(command, cwd=folder, env=kept | given, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    """Build the wheel from a copy of the repository, and let pip install it with its dependencies."""
    folder = tmp_path_factory.mktemp("wheel")
    source, environment = folder / "repository", folder / "environment"
    source.mkdir()
    for name in ("Makefile", "pyproject.toml", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(REPOSITORY / name, source)
    for name in ("rm_robust", "serve", "pipelines", "research", "tests"):
        shutil.copytree(REPOSITORY / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "results"))
    built = run("make", "wheel", f"PYTHON={sys.executable}", folder=source)
    assert built.returncode == 0, built.stderr
    (wheel,) = (source / "dist").glob("rm_robust-*.whl")
    for command in (("-m", "venv", str(environment)), ("-m", "pip", "install", "--quiet", str(wheel))):
        python = sys.executable if command[1] == "venv" else str(environment / "bin" / "python")
        ended = run(python, *command, folder=folder)
        assert ended.returncode == 0, ended.stderr
    return Installed(wheel, environment / "bin")


def test_the_wheel_holds_what_runs_and_neither_research_nor_tests(installed: Installed) -> None:
    with zipfile.ZipFile(installed.wheel) as wheel:
        files = {Path(name) for name in wheel.namelist()}
    assert {path.parts[0] for path in files if not path.parts[0].endswith(".dist-info")} == {
        "rm_robust",
        "serve",
        "pipelines",
    }
    ours = {
        path.relative_to(REPOSITORY)
        for folder in ("rm_robust", "serve", "pipelines")
        for kind in ("*.py", "*.toml", "*.jinja", "*.html", "*.yaml", "py.typed")
        for path in (REPOSITORY / folder).rglob(kind)
    }
    assert ours - files == set()
    assert not [path for path in files if path.name.startswith("test_")]


def test_it_installs_none_of_the_heavy_packages(installed: Installed) -> None:
    code = f"import importlib.util as i; print([name for name in {HEAVY} if i.find_spec(name)])"
    assert installed.prints("python", "-c", code) == "[]\n"


def test_a_key_is_made_and_scores_come_over_http_for_a_file_and_in_python(installed: Installed, tmp_path: Path) -> None:
    made = installed.run("rm-robust", "keys", "alice")
    (key,) = re.findall(r"^  (rmk_\S+)$", made.stderr, re.MULTILINE)
    keys_file = made.stdout
    rows = [
        {"prompt": prompt, "completions": ["Anna and Ben.", prompt, ""]}
        for prompt in islice(distinct_prompts(Random(0)), 20)
    ]
    expected = [[gold_score(row["prompt"], completion) for completion in row["completions"]] for row in rows]
    lines = [json.dumps(row) for row in rows]
    (tmp_path / "data.jsonl").write_text("".join(f"{line}\n" for line in lines))
    settings = ServiceSettings(
        models=(ModelSettings(model_name="judge", embedded_judge=True),),
        api_keys=parse_keys(keys_file, source="printed"),
    )
    with local_ray(num_cpus=2), local_service(settings) as service:
        command = ("rm-robust", "score", str(tmp_path / "data.jsonl"), "--url", service.url)
        refused = installed.run(*command).stderr
        assert "HTTP 401" in refused
        assert "Set RM_ROBUST_API_KEY to a key of the service" in refused
        assert "20 lines" in installed.prints(*command, key=key)
        in_python = installed.prints("python", "-c", SCORE_IN_PYTHON, service.url, *lines, key=key)
    written = [json.loads(line) for line in (tmp_path / "data.scores.jsonl").read_text().splitlines()]
    assert [row["scores"] for row in written] == expected
    assert json.loads(in_python) == expected


@pytest.mark.parametrize("command", ["run", "demo", "status", "train-sft", "settings --markdown"])
def test_a_command_that_needs_more_says_in_one_line_what_to_install(installed: Installed, command: str) -> None:
    ended = installed.run("rm-robust", *command.split())
    assert (ended.returncode, ended.stdout) == (2, "")
    (line,) = ended.stderr.splitlines()
    assert line.startswith(f"error: `rm-robust {command.split()[0]}` needs ")
    assert "Clone the repository and run `make install` there" in line


def test_its_help_and_its_settings_need_no_more(installed: Installed) -> None:
    assert "train-reward-model" in installed.prints("rm-robust", "--help")
    assert "--rloo.num_steps 200" in installed.prints("rm-robust", "run", "--help")
    assert "rloo.num_steps" in installed.prints("rm-robust", "settings", "rloo.num_steps")
