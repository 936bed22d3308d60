"""Imports point down. A module may import what lies in the layers below it, and its own folder."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

LAYERS = (
    "errors, config, runs, cluster, data, models, training, scoring, rloo + report + responses + serve, "
    "evaluation, pipelines, research"
)
"""Folders (and one file), bottom to top. Those that share a layer do not import each other."""
LEVELS = {name: level for level, layer in enumerate(LAYERS.split(", ")) for name in layer.split(" + ")}
HOMES = {
    "vllm": ["rm_robust.rloo.engine", "rm_robust.rloo.weights", "rm_robust.responses.generation"],
    "deepspeed": ["rm_robust.training.engines.deepspeed"],
    "fastapi": ["serve"],
}
"""The modules that may import a heavy library."""
READS_USERS_FILES = ["rm_robust.data.files"]
"""Modules that read what a user names, which may lie in a bucket of the user's."""
OTHER_MEANINGS = ["mlflow_uri", "_uri_has_an_experiment", "bucket"]
"""The address of an MLflow server, and a bucket of gradients that ranks reduce together."""
FILES = [
    path for folder in ("rm_robust", "serve", "pipelines", "research") for path in sorted(Path(folder).rglob("*.py"))
]
MODULES = {
    ".".join(path.with_suffix("").parts).removesuffix(".__init__"): ast.parse(path.read_text()) for path in FILES
}


def folder_of(module: str) -> str:
    """Return the folder of a module, as LAYERS names it. Every folder has a layer."""
    folder = module.removeprefix("rm_robust.").split(".")[0]
    assert folder in LEVELS, f"{module} has no layer: add {folder} to LAYERS"
    return folder


def imports(module: str, *, inside_functions: bool) -> set[str]:
    """Return the absolute names of what a module imports, but for imports that only annotations need.

    "from a import b" counts as a.b where that is a module of ours.
    """

    def nodes(tree: ast.AST) -> Iterator[ast.AST]:
        for node in ast.iter_child_nodes(tree):
            is_for_types = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
            if not is_for_types and (inside_functions or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)):
                yield node
                yield from nodes(node)

    names: set[str] = set()
    for node in nodes(MODULES[module]):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.module, f"{module} imports relatively"
            names |= {
                full if (full := f"{node.module}.{alias.name}") in MODULES else node.module for alias in node.names
            }
    return names


def loaded_with(module: str) -> set[str]:
    """Return the libraries that importing a module of ours loads, also through other modules and packages of ours."""
    seen: set[str] = set()
    waiting = with_packages(module)
    libraries: set[str] = set()
    while waiting:
        importing = waiting.pop()
        seen.add(importing)
        names = imports(importing, inside_functions=False)
        libraries |= {name.split(".")[0] for name in names - MODULES.keys()}
        waiting |= {part for name in names & MODULES.keys() for part in with_packages(name)} - seen
    return libraries


def with_packages(module: str) -> set[str]:
    """Return the module and the packages around it, whose code an import runs too."""
    parts = module.split(".")
    return {".".join(parts[:length]) for length in range(1, len(parts) + 1)} & MODULES.keys()


def test_every_import_points_down_or_stays_in_its_folder() -> None:
    violations = []
    for module in MODULES.keys() - {"rm_robust"}:
        for name in imports(module, inside_functions=True) & MODULES.keys() - {"rm_robust"}:
            own, other = folder_of(module), folder_of(name)
            if other != own and LEVELS[other] >= LEVELS[own]:
                violations.append(f"{module} imports {name}")
    assert not violations, "\n".join(sorted(violations))


def test_no_module_imports_itself_through_others() -> None:
    """Also not inside functions: an import there only hides a circle."""
    below = {module: imports(module, inside_functions=True) & MODULES.keys() - {module} for module in MODULES}
    while leaves := {module for module, names in below.items() if not names & below.keys()}:
        below = {module: names for module, names in below.items() if module not in leaves}
    assert not below, f"these modules import each other: {sorted(below)}"


def test_the_library_is_a_dozen_folders() -> None:
    assert (
        len([entry for entry in Path("rm_robust").iterdir() if entry.name not in ("__init__.py", "__pycache__")]) <= 13
    )


@pytest.mark.parametrize("library", HOMES)
def test_a_heavy_library_is_imported_in_its_home_alone(library: str) -> None:
    users = {
        module
        for module in MODULES
        if not module.startswith("research.")
        and library in {name.split(".")[0] for name in imports(module, inside_functions=True)}
    }
    assert users
    assert not {user for user in users if not any(f"{user}.".startswith(f"{home}.") for home in HOMES[library])}


@pytest.mark.parametrize(
    ("module", "unwanted"),
    [
        ("rm_robust.scoring", {"torch", "ray", "transformers", "numpy"}),
        ("rm_robust.config.loading", {"ray", "transformers"}),
        ("research.scaling.__main__", {"torch", "ray", "transformers"}),
        ("rm_robust.models.packing", {"ray", "pydantic"}),
        ("rm_robust.training.reward_model.losses", {"ray", "transformers", "pydantic"}),
        ("rm_robust.training.reward_model.training", {"ray"}),
        ("rm_robust.evaluation.scenarios", {"ray"}),
        ("rm_robust.training.sft", {"ray"}),
        ("serve.app", {"datasets"}),
        ("pipelines.full_rlhf", set()),
    ],
)
def test_importing_a_module_does_not_load_what_it_does_not_need(module: str, unwanted: set[str]) -> None:
    heavy = {"vllm", "deepspeed"} | (set() if module.startswith("serve") else {"fastapi"})
    assert not loaded_with(module) & (unwanted | heavy)


def test_the_scoring_client_runs_without_torch_and_ray() -> None:
    code = "import sys, rm_robust.scoring; sys.exit(len({'torch', 'ray', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], timeout=200).returncode == 0


def test_no_file_outside_of_runs_knows_where_a_run_lies() -> None:
    """rm_robust/runs/files.py is the only door to a run's files; forgetting to fetch or to put one would be a silent
    bug."""
    outside = [module for module in MODULES if not module.startswith("rm_robust.runs")]
    importing = [
        f"{module} imports {name}"
        for module in outside
        for name in imports(module, inside_functions=True)
        if name.startswith("rm_robust.runs.storage") or (name == "pyarrow.fs" and module not in READS_USERS_FILES)
    ]
    naming = [
        f"{module}, line {node.lineno}: {name}"
        for module in outside
        for node, name in identifiers(MODULES[module])
        if re.search(r"(?:^|_)(?:uri|bucket|own_copy)(?:_|$)", name) and name not in OTHER_MEANINGS
    ]
    assert not importing + naming, "\n".join(importing + naming)


def identifiers(tree: ast.Module) -> Iterator[tuple[Any, str]]:
    """Yield every name that code of the module defines or uses, with its node."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            yield node, node.id
        elif isinstance(node, ast.Attribute):
            yield node, node.attr
        elif isinstance(node, ast.arg | ast.keyword) and node.arg is not None:
            yield node, node.arg
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node, node.name
        elif isinstance(node, ast.alias):
            yield node, node.asname or node.name
