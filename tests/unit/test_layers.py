"""Imports point down. The layers are listed here once; a module may import what lies below its layer, and its own folder."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

LAYERS = [
    ["rm_robust.config_parts", "rm_robust.errors", "rm_robust.records", "rm_robust.reward_model.objectives"],
    ["rm_robust.filesystems", "rm_robust.gloo_interface", "rm_robust.log_lines", "rm_robust.remote_errors"],
    ["rm_robust.object_storage"],
    ["rm_robust.config_rloo", "rm_robust.score_contract"],
    [
        "rm_robust.reward_model.losses",
        "rm_robust.reward_model.metrics",
        "rm_robust.rloo.advantages",
        "rm_robust.rloo.rewards",
        "rm_robust.rloo.policy_comparison",
        "rm_robust.packed_attention",
    ],  # pure maths
    ["rm_robust.rloo.losses"],
    ["rm_robust.checkpoint"],
    [
        "rm_robust.chat",
        "rm_robust.config",
        "rm_robust.data_files",
        "rm_robust.packing",
        "rm_robust.scoring",
        "rm_robust.token_files",
        "rm_robust.tracking",
    ],
    [
        "rm_robust.best_step",
        "rm_robust.cluster_metrics",
        "rm_robust.compute",
        "rm_robust.config_loading",
        "rm_robust.rows",
        "rm_robust.run_claim",
        "rm_robust.run_layout",
        "rm_robust.ray_session",
        "rm_robust.score_files",
        "rm_robust.shared_stages",
        "rm_robust.train_engine",
        "rm_robust.worker_group",
    ],
    [
        "rm_robust.cluster_capacity",
        "rm_robust.data_pipeline",
        "rm_robust.experiment_trackers",
        "rm_robust.deepspeed_engine",
        "rm_robust.fsdp_engine",
        "rm_robust.policy_model",
        "rm_robust.status",
        "rm_robust.scaling",
        "rm_robust.training_loop",
        "rm_robust.training_state",
    ],
    ["rm_robust.embedded_world", "rm_robust.preferences", "rm_robust.sft", "rm_robust.reward_model", "rm_robust.rloo", "rm_robust.run_record"],  # stages
    ["serve", "rm_robust.report"],
    ["rm_robust.evaluation"],
    ["rm_robust.summary"],
    ["rm_robust.stages"],
    ["rm_robust.responses", "rm_robust.study"],
    ["pipelines"],
]
UPWARD = {
    ("rm_robust.train_engine", "rm_robust.deepspeed_engine"),
    ("rm_robust.train_engine", "rm_robust.fsdp_engine"),
    ("rm_robust.scoring", "rm_robust.score_files"),
}
"""On purpose: create_engine imports the engine that the config names, inside the function; `python -m rm_robust.scoring` is a command's name."""
HOMES = {
    "vllm": [
        "rm_robust.rloo.vllm_engine",
        "rm_robust.rloo.weight_sync",
        "rm_robust.rloo.gloo_weight_transfer",
        "rm_robust.rloo.vllm_weight_loader",
        "rm_robust.responses.generation",
    ],
    "deepspeed": ["rm_robust.deepspeed_engine"],
    "fastapi": ["serve"],
}
FILES = [path for folder in ("rm_robust", "serve", "pipelines") for path in sorted(Path(folder).rglob("*.py"))]
MODULES = {".".join(path.with_suffix("").parts).removesuffix(".__init__"): ast.parse(path.read_text()) for path in FILES}


def place(module: str) -> tuple[int, str]:
    """A module's layer and the entry that names it, the longest one: "rm_robust.report" for "rm_robust.report_figures" too."""
    entries = [(len(entry), level, entry) for level, layer in enumerate(LAYERS) for entry in layer if f"{module}.".startswith((f"{entry}.", f"{entry}_"))]
    assert entries, f"{module} has no layer: add it to LAYERS"
    return max(entries)[1:]


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
            found |= {full if (full := f"{node.module}.{alias.name}") in MODULES else node.module for alias in node.names}
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
        level, entry = place(module)
        for name in imports(module, inside_functions=True) & MODULES.keys() - {"rm_robust"}:
            other_level, other_entry = place(name)
            if (other_level >= level and other_entry != entry) and (module, name) not in UPWARD:
                violations.append(f"{module} (layer {level}) imports {name} (layer {other_level})")
    assert not violations, "\n".join(sorted(violations))


@pytest.mark.parametrize("library", HOMES)
def test_a_heavy_library_is_imported_in_its_home_alone(library: str) -> None:
    users = {module for module in MODULES if library in {name.split(".")[0] for name in imports(module, inside_functions=True)}}
    assert users
    assert not {user for user in users if not any(f"{user}.".startswith(f"{home}.") for home in HOMES[library])}


@pytest.mark.parametrize(
    ("module", "unwanted"),
    [
        ("rm_robust.scoring", {"torch", "ray", "transformers", "numpy"}),
        ("rm_robust.config_loading", {"ray", "transformers"}),
        ("rm_robust.scaling.__main__", {"torch", "ray", "transformers"}),
        ("rm_robust.packing", {"ray", "pydantic"}),
        ("rm_robust.reward_model.losses", {"ray", "transformers", "pydantic"}),
        ("rm_robust.reward_model.training", {"ray"}),
        ("rm_robust.reward_model.evaluation", {"ray"}),
        ("rm_robust.sft.training", {"ray"}),
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
