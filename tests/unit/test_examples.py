"""The examples are short, say how to run them and what one sees, are tested, and can be found from the README."""

import ast
import re
from pathlib import Path

import pytest

from rm_robust.config.loading import load_config
from tests.support.notebook import cells_of, code_of

REPOSITORY = Path(__file__).parents[2]
EXAMPLES = REPOSITORY / "examples"
SCRIPTS = sorted(EXAMPLES.glob("*.py"))
NOTEBOOKS = sorted(EXAMPLES.glob("*.ipynb"))
MOST_LINES = 40


def names(paths: list[Path]) -> list[str]:
    return [path.name for path in paths]


@pytest.mark.parametrize("script", SCRIPTS, ids=names(SCRIPTS))
def test_a_script_is_short_and_begins_with_what_it_does_how_to_run_it_and_how_long_it_takes(script: Path) -> None:
    text = script.read_text()
    assert len(text.splitlines()) <= MOST_LINES
    docstring = ast.get_docstring(ast.parse(text)) or ""
    assert re.match(r"[A-Z].*[.?:]", docstring.splitlines()[0])
    assert f"\n    .venv/bin/python examples/{script.name}" in docstring
    assert re.search(r"\b(seconds?|minutes?)\b", docstring)
    assert re.search(r"\b[Yy]ou see\b", docstring)


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=names(NOTEBOOKS))
def test_a_notebook_holds_plain_python_without_results(notebook: Path) -> None:
    ast.parse(code_of(notebook))  # a magic is not Python
    code_cells = [cell for cell in cells_of(notebook) if cell["cell_type"] == "code"]
    assert len(code_cells) > 3
    assert [cell["id"] for cell in code_cells if cell["outputs"] or cell["execution_count"] is not None] == []


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=names(NOTEBOOKS))
def test_every_link_of_a_notebook_within_the_repository_leads_somewhere(notebook: Path) -> None:
    texts = ["".join(cell["source"]) for cell in cells_of(notebook) if cell["cell_type"] == "markdown"]
    targets = [target for text in texts for target in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in target]
    assert targets
    assert [target for target in targets if not (EXAMPLES / target).exists()] == []


def test_every_example_is_run_by_a_test() -> None:
    tests = (REPOSITORY / "tests" / "e2e" / "test_examples.py").read_text()
    assert len(SCRIPTS) == 5
    assert len(NOTEBOOKS) == 1
    assert [name for name in names(SCRIPTS + NOTEBOOKS) if f'"{name}"' not in tests] == []


def test_the_readme_leads_to_the_page_of_the_examples_which_names_them_all() -> None:
    assert "(examples/README.md)" in (REPOSITORY / "README.md").read_text()
    page = (EXAMPLES / "README.md").read_text()
    assert [name for name in names(SCRIPTS + NOTEBOOKS) if f"[{name}]({name})" not in page] == []


@pytest.mark.parametrize("config", sorted(EXAMPLES.glob("*.toml")), ids=lambda path: path.name)
def test_a_config_is_valid_and_belongs_to_a_script(config: Path) -> None:
    load_config(config, [])
    assert config.with_suffix(".py") in SCRIPTS
