"""Imports point down. The layers are listed here once; a module may import what lies below its layer, and its own folder."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

LAYERS = "errors, config, runs, cluster, data, models, training, scoring, rloo + report + responses + serve, evaluation, pipelines, research"
"""Folders (and one file), bottom to top. Those that share a layer do not import each other."""
HOMES = {
    "vllm": ["rm_robust.rloo.engine", "rm_robust.rloo.weights", "rm_robust.responses.generation"],
    "deepspeed": ["rm_robust.training.engines.deepspeed"],
    "fastapi": ["serve"],
}
FILES = [
    path for folder in ("rm_robust", "serve", "pipelines", "research") for path in sorted(Path(folder).rglob("*.py"))
]
MODULES = {
    ".".join(path.with_suffix("").parts).removesuffix(".__init__"): ast.parse(path.read_text()) for path in FILES
}


LEVELS = {name: level for level, layer in enumerate(LAYERS.split(", ")) for name in layer.split(" + ")}


def folder_of(module: str) -> str:
    """Return the folder of a module, as LAYERS names it. Every folder has a layer."""
    folder = module.removeprefix("rm_robust.").split(".")[0]
    assert folder in LEVELS, f"{module} has no layer: add {folder} to LAYERS"
    return folder


def imports(module: str, *, inside_functions: bool) -> set[str]:
    """Absolute names of what a module imports; "from a import b" is a.b where that is a module of ours. Imports for annotations alone are left out."""

    def nodes(tree: ast.AST) -> Iterator[ast.AST]:
        for node in ast.iter_child_nodes(tree):
            is_for_types = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
            if not is_for_types and (inside_functions or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)):
                yield node
                yield from nodes(node)

    found: set[str] = set()
    for node in nodes(MODULES[module]):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.module, f"{module} imports relatively"
            found |= {
                full if (full := f"{node.module}.{alias.name}") in MODULES else node.module for alias in node.names
            }
    return found


def loaded_with(module: str) -> set[str]:
    """Libraries that importing a module of ours loads, through other modules of ours too."""
    seen, waiting = {module}, [module]
    libraries: set[str] = set()
    while waiting:
        names = imports(waiting.pop(), inside_functions=False)
        libraries |= {name.split(".")[0] for name in names - MODULES.keys()}
        waiting += [name for name in names & MODULES.keys() if name not in seen]
        seen |= names & MODULES.keys()
    return libraries


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
