"""What README and docs name exists: files, make targets, modules and TOML."""

import re
import tomllib
from pathlib import Path

import pytest
from pydantic import ValidationError

from rm_robust.config.run import PipelineConfig
from serve.settings import ServiceSettings

REPOSITORY = Path(__file__).parents[2]
PAGES = sorted([REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", *(REPOSITORY / "docs").rglob("*.md")])
IDS = [str(page.relative_to(REPOSITORY)) for page in PAGES]
FOLDERS = "cluster.yaml|deploy|docs|pipelines|requirements|research|rm_robust|serve|tests"


def code_blocks(page: Path, language: str) -> list[str]:
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)
    return [block for name, block in blocks if name == language]


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_every_file_that_is_named_exists(page: Path) -> None:
    named = re.findall(
        rf"(?<![\w/.])(?:{FOLDERS})/[\w/.-]+\.(?:py|toml|sh|txt|lock|md|yaml|json|jsonl|html|png)\b", page.read_text()
    )
    assert [path for path in sorted(set(named)) if not (REPOSITORY / path).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_every_link_within_the_repository_leads_somewhere(page: Path) -> None:
    targets = [
        target.partition("#")[0] for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()) if "://" not in target
    ]
    assert [target for target in targets if target and not (page.parent / target).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_every_make_target_that_is_named_exists(page: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE))
    prose = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    lines = [line.strip() for block in code_blocks(page, "") for line in block.splitlines()]
    commands = [line.partition("#")[0] for line in lines] + re.findall("`([^`]+)`", prose)
    named = {
        word
        for command in commands
        if command.startswith("make ")
        for word in command.split()[1:]
        if re.fullmatch("[a-z-]+", word)
    }
    assert named <= targets, f"the Makefile has no {sorted(named - targets)}"


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_every_module_that_a_command_runs_exists(page: Path) -> None:
    named = set(re.findall(r"python -m ((?:rm_robust|serve|research)[\w.]*)", page.read_text()))
    files = {module: REPOSITORY / module.replace(".", "/") for module in named if "bench.X" not in module}
    assert [
        module
        for module, path in files.items()
        if not (path / "__main__.py").exists() and not path.with_suffix(".py").exists()
    ] == []


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_every_toml_block_is_a_valid_config_or_service(page: Path) -> None:
    for block in code_blocks(page, "toml"):
        values = tomllib.loads(block)
        try:
            PipelineConfig.model_validate(values)
        except ValidationError:
            ServiceSettings.model_validate(values)


def test_cluster_yaml_says_the_same_commands_as_its_page() -> None:
    """The last block under the heading of AWS: from a ready terminal to the submitted job."""
    text = "\n".join(page.read_text() for page in PAGES)
    (section,) = re.findall(r"^#+ On AWS\n(.*?)(?=^#+ )", text, re.MULTILINE | re.DOTALL)
    commands = [
        line
        for block in re.findall(r"^```\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
        for line in block.splitlines()
    ]
    assert commands
    cluster_yaml = (REPOSITORY / "cluster.yaml").read_text()
    assert [command for command in commands if f"#   {command}" not in cluster_yaml] == []
