"""What README says is true: its tree is the tree, its config is valid, its make targets and paths exist, and a job is a few commands away."""

import re
import shutil
import stat
import subprocess
import tomllib
from pathlib import Path

import pytest

from rm_robust.config import PipelineConfig
from serve.settings import ServiceSettings

REPOSITORY = Path(__file__).parents[2]
README = (REPOSITORY / "README.md").read_text()
LISTED_FOLDERS = ("requirements", "pipelines", "rm_robust", "serve", "deploy")
"""Folders whose files the tree names one by one."""


def code_blocks(language: str, text: str = README) -> list[str]:
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [block for name, block in blocks if name == language]


def listed_paths(tree: str) -> set[str]:
    """Files of a tree whose folders end in "/" and whose depth is two spaces a level."""
    folders: list[str] = []
    paths = set()
    for line in tree.splitlines():
        name = line.split()[0]
        depth = (len(line) - len(line.lstrip())) // 2
        folders = [*folders[:depth], name] if name.endswith("/") else folders[:depth]
        if not name.endswith("/"):
            paths.add("".join(folders) + name)
    return paths


def files_on_disk() -> set[str]:
    files = [path for folder in LISTED_FOLDERS for path in (REPOSITORY / folder).rglob("*")]
    return {str(path.relative_to(REPOSITORY)) for path in files if path.is_file() and path.name != "__init__.py" and "__pycache__" not in path.parts}


def test_the_tree_names_every_file_and_no_other() -> None:
    (tree,) = [block for block in code_blocks("") if block.startswith("README.md")]
    listed = listed_paths(tree)
    assert {path for path in listed if path.startswith(LISTED_FOLDERS)} == files_on_disk()
    assert [path for path in listed if not (REPOSITORY / path).exists()] == []


def test_a_tree_is_read_by_its_indentation() -> None:
    assert listed_paths("a.md  x\nb/\n  c.py  y\n  d/  z\n    e.py\n  f.py\ng.py") == {"a.md", "b/c.py", "b/d/e.py", "b/f.py", "g.py"}


def test_the_example_config_and_service_are_valid() -> None:
    config, service = code_blocks("toml")
    assert PipelineConfig.model_validate(tomllib.loads(config)).name == "mine"
    assert ServiceSettings.model_validate(tomllib.loads(service)).ensembles[0].members == ("proxy", "second")


def test_every_make_target_that_is_named_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE))
    prose = re.sub(r"^```.*?^```$", "", README, flags=re.MULTILINE | re.DOTALL)
    commands = [line.partition("#")[0] for block in code_blocks("") for line in block.splitlines()] + re.findall("`([^`]+)`", prose)
    named = {word for command in commands if command.startswith("make ") for word in command.split()[1:] if re.fullmatch("[a-z-]+", word)}
    assert {"demo", "test", "test-all", "serve"} <= named <= targets


def test_every_script_and_config_that_is_named_exists() -> None:
    named = set(re.findall(r"\b(?:pipelines|rm_robust|requirements|serve)/[\w/.]+\.(?:py|toml|sh|txt|lock)", README))
    assert named
    assert [path for path in sorted(named) if not (REPOSITORY / path).exists()] == []


def section(title: str) -> str:
    """From its heading to the next one."""
    (text,) = re.findall(rf"^#+ {title}\n(.*?)(?=^#+ )", README, re.MULTILINE | re.DOTALL)
    return str(text)


def commands_of(title: str) -> list[str]:
    """Every line of the section's blocks; a line that holds two commands counts as two."""
    lines = [line for block in code_blocks("", section(title)) for line in block.splitlines()]
    return [part for line in lines for part in ([line] if line.startswith("for ") else re.split(r";|&&", line))]


WAYS = {
    "As a Ray job": "ray job submit --working-dir . -- python pipelines/full_rlhf.py --config pipelines/configs/smoke.toml",
    "On several machines of your own": "ray job submit --working-dir . -- python pipelines/full_rlhf.py --config pipelines/configs/tiny_cpu.toml",
    "On AWS": "RAY_ADDRESS=http://127.0.0.1:8265 ray job submit --working-dir . -- python pipelines/full_rlhf.py --config pipelines/configs/full_rlhf.toml",
    "On Kubernetes": "kubectl apply -f deploy/ray_job.yaml",
}
"""Heading -> the command that submits the job."""


@pytest.mark.parametrize("title", WAYS)
def test_a_job_is_at_most_five_commands_away(title: str) -> None:
    commands = commands_of(title)
    assert commands[-1] == WAYS[title]
    assert len(commands) <= 5, commands
    assert title == "On Kubernetes" or commands[0].startswith("source deploy/ray_environment.sh"), "which also installs"


def test_cluster_yaml_says_the_same_commands_as_readme() -> None:
    text = (REPOSITORY / "cluster.yaml").read_text()
    assert [command for command in commands_of("On AWS") if f"#   {command}" not in text] == []


def test_no_block_has_commands_of_two_machines() -> None:
    """A `ray start --block` ends its block: what follows would wait for ever."""
    starts = [block.splitlines() for block in code_blocks("") if "ray start" in block]
    assert len(starts) == 3
    assert [lines for lines in starts if "--block" not in lines[-1]] == []


def test_every_test_that_the_faults_name_exists() -> None:
    named = re.findall(r"\btests/[\w/]+\.py", (REPOSITORY / "docs" / "FAULTS.md").read_text())
    assert len(set(named)) >= 10
    assert [path for path in named if not (REPOSITORY / path).is_file()] == []


FAKES = {
    "make": 'echo "$@" > made\nmkdir -p .venv/bin\necho "export PATH=$PWD/.venv/bin:$PATH" > .venv/bin/activate\nexit $MAKE_STATUS',
    "ray": """test "$*" = "get-auth-token --generate" && test "$RAY_AUTH_MODE" = token && mkdir -p ~/.ray || exit 1
test -n "$RAY_AUTH_TOKEN" || test -e ~/.ray/auth_token || { echo made > ~/.ray/auth_token; ls -l ~/.ray/auth_token > created; }""",
}
"""In place of an installation that takes minutes."""


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
@pytest.mark.parametrize(("make_status", "argument"), [(0, ""), (0, "/shared/runs"), (2, "")])
def test_a_terminal_is_ready_for_ray_after_one_command_or_says_why_not(tmp_path: Path, make_status: int, argument: str) -> None:
    told = source_ray_environment(tmp_path, f"{argument}\necho $? $RAY_AUTH_MODE $RAY_JOB_STOP_WAIT_TIME_S $RM_ROBUST_RUN_ROOT", MAKE_STATUS=str(make_status))
    assert told.stdout.split() == (["0", "token", "60", *argument.split()] if make_status == 0 else ["2"]), told.stderr
    assert (tmp_path / "made").read_text() == "--no-print-directory install\n"
    assert (tmp_path / ".ray" / "auth_token").exists() == (make_status == 0)


def source_ray_environment(home: Path, rest: str = "", **variables: str) -> subprocess.CompletedProcess[str]:
    """In a terminal whose files everybody may read; the script's line ends in `rest`."""
    for name, text in FAKES.items():
        (home / name).write_text(f"#!/bin/sh\n{text}\n")
        (home / name).chmod(0o755)
    environment = {"HOME": str(home), "PATH": f"{home}:/usr/bin:/bin", "MAKE_STATUS": "0", **variables}
    script = f"umask 022; source {REPOSITORY}/deploy/ray_environment.sh {rest}"
    return subprocess.run(["bash", "-c", script], cwd=home, env=environment, capture_output=True, text=True, timeout=30)


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_rays_token_is_never_readable_by_others_and_the_terminals_umask_stays(tmp_path: Path) -> None:
    told = source_ray_environment(tmp_path, "&& umask")
    assert (told.stdout, told.stderr) == ("0022\n", "")
    assert (tmp_path / "created").read_text().startswith("-rw-------"), "from the start, and not by a chmod after it"


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
@pytest.mark.parametrize("mode", [0o600, 0o400, 0o640, 0o604, 0o644, 0o444])
@pytest.mark.parametrize("is_link", [False, True])
@pytest.mark.parametrize("variables", [{}, {"RAY_AUTH_TOKEN": "of another cluster"}])
def test_a_token_that_others_could_read_is_replaced_and_what_to_restart_is_said(tmp_path: Path, mode: int, is_link: bool, variables: dict[str, str]) -> None:
    token = tmp_path / ".ray" / "auth_token"
    token.parent.mkdir()
    held = tmp_path / "elsewhere" if is_link else token
    held.write_text("old\n")
    held.chmod(mode)
    if is_link:
        token.symlink_to(held)
    told = source_ray_environment(tmp_path, **variables)
    assert told.returncode == 0, told.stderr
    if mode in (0o600, 0o400):
        assert (token.read_text(), told.stderr) == ("old\n", "")
        return
    assert (token.read_text(), stat.S_IMODE(token.lstat().st_mode)) == ("made\n", 0o600)
    (line,) = told.stderr.splitlines()
    assert re.search(r"a new token takes its place\. Stop, and start again, every cluster and run that began with the old one", line)
