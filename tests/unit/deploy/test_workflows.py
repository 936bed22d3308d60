"""The workflows of GitHub Actions do nothing but what the Makefile and .ci/run do, with the Python of the locks."""

import os
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

REPOSITORY = Path(__file__).parents[3]
WORKFLOWS = sorted((REPOSITORY / ".github" / "workflows").glob("*"))
RUNS = {
    "ci.yml": [".ci/run"],
    "build.yml": ["make wheel", "make image"],
    "nightly.yml": ["make test-all", "make test-cluster"],
}
PYTHON = "3.11"
ACTIONS = ("actions/checkout", "actions/setup-python", "actions/upload-artifact")


def steps_of(workflow: Path) -> list[dict[str, Any]]:
    """Return the steps of all jobs, in order."""
    jobs = yaml.safe_load(workflow.read_text())["jobs"]
    return [step for job in jobs.values() for step in job["steps"]]


def commands_of(workflow: Path) -> list[str]:
    """Return the lines of all `run:` steps."""
    return [line for step in steps_of(workflow) for line in step.get("run", "").splitlines()]


def check_command(command: str) -> None:
    """Check that a command of a workflow is a target of the Makefile or an executable of the repository."""
    targets = re.findall(r"^([a-z-]+):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE)
    program, *arguments = command.split()
    if program == "make":
        assert arguments
        assert set(arguments) <= set(targets), f"the Makefile has no {command}"
    else:
        assert command == ".ci/run", f"{command} is neither a make target nor .ci/run"
        assert os.access(REPOSITORY / command, os.X_OK)


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.name)
def test_a_workflow_runs_its_commands_alone_and_each_exists(workflow: Path) -> None:
    assert commands_of(workflow) == RUNS[workflow.name]
    for command in commands_of(workflow):
        check_command(command)


def test_there_are_the_workflows_that_are_checked() -> None:
    assert [path.name for path in WORKFLOWS] == sorted(RUNS)


@pytest.mark.parametrize("command", ["make no-such-target", "make", "pip install .", ".ci/other", "make test && true"])
def test_another_command_is_refused(command: str) -> None:
    with pytest.raises(AssertionError):
        check_command(command)


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.name)
def test_a_workflow_uses_githubs_actions_by_major_version_and_the_python_of_the_locks(workflow: Path) -> None:
    uses = [step["uses"] for step in steps_of(workflow) if "uses" in step]
    assert uses
    assert [name for name in uses if not re.fullmatch(rf"(?:{'|'.join(ACTIONS)})@v\d+", name)] == []
    versions = {step["with"]["python-version"] for step in steps_of(workflow) if "setup-python" in step.get("uses", "")}
    assert versions == {PYTHON}


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.name)
def test_a_workflow_may_only_read_and_names_no_registry(workflow: Path) -> None:
    assert yaml.safe_load(workflow.read_text())["permissions"] == {"contents": "read"}
    assert not re.search(r"https?://|\b[\w-]+\.(?:org|io|com)\b", workflow.read_text())


def test_every_push_and_pull_request_is_tested() -> None:
    parsed = yaml.safe_load((REPOSITORY / ".github" / "workflows" / "ci.yml").read_text())
    assert parsed[True] == ["push", "pull_request"]  # YAML 1.1 reads the key `on` as true
