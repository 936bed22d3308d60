"""Check that what README and docs name exists, that their commands parse, and that README is one page."""

import re
import shlex
import tomllib
from pathlib import Path

import pytest
from pydantic import ValidationError

from pipelines.command import BY_NAME, command_for, parsed
from rm_robust.config.run import PipelineConfig
from serve.settings import ServiceSettings
from tests.unit.test_layers import LAYERS

REPOSITORY = Path(__file__).parents[2]
TOP_PAGES = [REPOSITORY / name for name in ("README.md", "CONTRIBUTING.md", "examples/README.md")]
PAGES = sorted([*TOP_PAGES, *(REPOSITORY / "docs").rglob("*.md")])
IDS = [str(page.relative_to(REPOSITORY)) for page in PAGES]
MOST_README_LINES = 150
MOST_COLUMNS = 110
COMMAND_WITHIN_LINES = 20
"""A page of docs/ begins with the command that does what the page is about."""
FOLDERS = "cluster.yaml|deploy|docs|examples|pipelines|requirements|research|rm_robust|serve|tests"


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


def arguments_of(line: str) -> list[str]:
    """Return what follows `rm-robust` on a line of a shell, up to a comment, a redirection or another command."""
    words = shlex.split(line.partition("rm-robust ")[2], comments=True)
    ends = [index for index, word in enumerate(words) if word in (">", ">>", "|", "&", "&&")]
    return words[: min(ends, default=len(words))]


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_every_command_of_rm_robust_in_a_block_parses(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [line for block in code_blocks(page, "") for line in block.replace("\\\n", " ").splitlines()]
    for line in lines:
        if not re.match(r" *(\w+=\S+ )*rm-robust ", line):
            continue
        name, *arguments = arguments_of(line)
        assert name in BY_NAME, line
        try:
            parsed(command_for(name, arguments), arguments)
        except SystemExit:
            pytest.fail(f"{line}\n{capsys.readouterr().err}")


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_every_command_and_option_of_rm_robust_in_the_prose_exists(
    page: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A sentence may name a command without the options that it needs, so nothing is parsed here."""
    prose = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for code in re.findall("`([^`]+)`", prose):
        if not code.startswith("rm-robust "):
            continue
        name, *arguments = arguments_of(" ".join(code.split()))
        if name in ("…", "--help", "--version"):
            continue
        assert name in BY_NAME, code
        with pytest.raises(SystemExit):
            parsed(command_for(name, arguments), ["--help"])
        known = set(re.findall(r"--[\w-]+", capsys.readouterr().out))
        assert {word.partition("=")[0] for word in arguments if word.startswith("--")} <= known, code


def test_every_page_of_docs_begins_with_a_command() -> None:
    pages = [page for page in PAGES if REPOSITORY / "docs" in page.parents]
    assert pages
    assert [
        str(page.relative_to(REPOSITORY))
        for page in pages
        if "```" not in page.read_text().splitlines()[:COMMAND_WITHIN_LINES]
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


def test_readme_is_one_page() -> None:
    assert len((REPOSITORY / "README.md").read_text().splitlines()) <= MOST_README_LINES


def test_every_path_of_the_tree_in_readme_exists() -> None:
    """A line of the tree begins with a path; two more spaces put it below the folder of an earlier line."""
    (tree,) = re.findall(
        r"^## The tree\n+```\n(.*?)^```$", (REPOSITORY / "README.md").read_text(), re.MULTILINE | re.DOTALL
    )
    paths, parents = [], [REPOSITORY]
    for line in tree.splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        parents[depth + 1 :] = [parents[depth] / line.split()[0]]
        paths.append(parents[-1])
    assert [str(path) for path in paths if not path.exists()] == []
    for folder in ("rm_robust", "pipelines", "serve", "research", "tests", "docs"):
        assert REPOSITORY / folder in paths
    folders = {path.parent for path in (REPOSITORY / "rm_robust").glob("*/__init__.py")}
    assert folders <= set(paths), "a folder of rm_robust/ is missing in the tree"


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_prose_has_short_lines(page: Path) -> None:
    """Tables, code blocks, images and the targets of links may be longer."""
    prose = re.sub(r"^ *```.*?^ *```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    lines = [
        re.sub(r"\]\([^)\s]+\)", "]", line) for line in prose.splitlines() if not re.match(r" *(\||!\[|<!--)", line)
    ]
    assert [line for line in lines if len(line) > MOST_COLUMNS] == []


def test_every_fault_names_a_test_that_exists() -> None:
    text = (REPOSITORY / "docs" / "cluster" / "faults.md").read_text()
    rows = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("| ")][2:]
    assert rows
    for fault, _, shown_by in rows:
        tests = [name.strip() for name in shown_by.split(",")]
        assert [name for name in tests if not re.fullmatch(r"tests/[\w/]+\.py", name)] == [], fault
        assert [name for name in tests if not (REPOSITORY / name).exists()] == [], fault


def test_architecture_names_the_layers_that_are_checked() -> None:
    (block,) = re.findall(
        r"^## The layers\n.*?```\n(.*?)^```$",
        (REPOSITORY / "docs" / "architecture.md").read_text(),
        re.MULTILINE | re.DOTALL,
    )
    named = [re.split(r"  +", line)[0].split(", ") for line in block.splitlines()]
    assert [set(layer) for layer in reversed(named)] == [set(layer.split(" + ")) for layer in LAYERS.split(", ")]
