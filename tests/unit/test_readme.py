"""What README says is true: its tree is the tree, its config is valid, its make targets and paths exist."""

import re
import tomllib
from pathlib import Path

from rm_robust.config import PipelineConfig
from serve.settings import ServiceSettings

REPOSITORY = Path(__file__).parents[2]
README = (REPOSITORY / "README.md").read_text()
LISTED_FOLDERS = ("requirements", "pipelines", "rm_robust", "serve", "deploy")
"""Folders whose files the tree names one by one."""


def code_blocks(language: str) -> list[str]:
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
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
