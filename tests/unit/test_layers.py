"""Imports point down. The layers are listed here once; a module may import its own layer's own folder and everything below."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

LAYERS = [
    ["rm_robust.errors", "rm_robust.records"],
    ["rm_robust.reward_model.losses", "rm_robust.reward_model.metrics", "rm_robust.rloo.advantages", "rm_robust.rloo.losses"],  # pure maths
    ["rm_robust.chat", "rm_robust.checkpoint", "rm_robust.config", "rm_robust.scoring", "rm_robust.token_files", "rm_robust.tracking"],
    ["rm_robust.config_loading", "rm_robust.packing", "rm_robust.rows", "rm_robust.run_layout", "rm_robust.train_engine"],
    ["rm_robust.data_pipeline", "rm_robust.deepspeed_engine", "rm_robust.policy_model", "rm_robust.training_loop", "rm_robust.training_state"],
    ["rm_robust.run_record", "rm_robust.worker_group"],
    ["rm_robust.embedded_world", "rm_robust.preferences", "rm_robust.sft", "rm_robust.reward_model", "rm_robust.rloo", "rm_robust.report"],
    ["serve", "rm_robust.summary"],
    ["rm_robust.stages"],
    ["pipelines"],
]
HOMES = {
    "vllm": {"rm_robust.rloo.vllm_engine", "rm_robust.rloo.weight_sync", "rm_robust.rloo.gloo_weight_transfer"},
    "deepspeed": {"rm_robust.deepspeed_engine"},
    "fastapi": {"serve"},
    "datasets": {"rm_robust.data_pipeline"},
}
LAZY = {("rm_robust.train_engine", "rm_robust.deepspeed_engine")}
"""Upward on purpose: create_engine imports the engine that the config names, inside the function."""

FILES = [path for folder in ("rm_robust", "serve", "pipelines") for path in sorted(Path(folder).rglob("*.py"))]
MODULES = {".".join(path.with_suffix("").parts).removesuffix(".__init__"): path for path in FILES}


def place(module: str) -> tuple[int, str]:
    """Index of a module's layer and the entry that names it: the longest one, "rm_robust.report" for "rm_robust.report_figures" too."""
    entries = [(len(entry), level, entry) for level, layer in enumerate(LAYERS) for entry in layer if f"{module}.".startswith((f"{entry}.", f"{entry}_"))]
    assert entries, f"{module} has no layer: add it to LAYERS"
    _, level, entry = max(entries)
    return level, entry


def imports(module: str) -> set[str]:
    """Absolute names of everything that a module imports, inside functions too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.module, f"{module} imports relatively"
            found |= {full if (full := f"{node.module}.{alias.name}") in MODULES else node.module for alias in node.names}
    return found


def test_every_import_points_down_or_stays_in_its_folder() -> None:
    ours = {module: [name for name in imports(module) if name in MODULES] for module in MODULES if "." in module}
    violations = [
        f"{module} (layer {place(module)[0]}) imports {name} (layer {place(name)[0]})"
        for module, names in ours.items()
        for name in names
        if place(name)[0] > place(module)[0] or (place(name)[0] == place(module)[0] >= 6 and place(name)[1] != place(module)[1])
        if (module, name) not in LAZY
    ]
    assert not violations, "\n".join(violations)


@pytest.mark.parametrize("library", HOMES)
def test_a_heavy_library_is_imported_in_its_home_alone(library: str) -> None:
    users = {module for module in MODULES if any(name.split(".")[0] == library for name in imports(module))}
    strangers = {module for module in users if not any(f"{module}.".startswith(f"{home}.") for home in HOMES[library])}
    assert not strangers
    assert users


@pytest.mark.parametrize(
    ("module", "unwanted"),
    [
        ("rm_robust.scoring", ["torch", "ray", "transformers", "fastapi", "vllm"]),
        ("rm_robust.config_loading", ["ray", "transformers", "vllm", "deepspeed"]),
        ("rm_robust.reward_model.training", ["ray", "vllm", "deepspeed", "fastapi"]),
        ("rm_robust.rloo.policy_trainer", ["vllm", "deepspeed", "fastapi"]),
        ("serve.app", ["vllm", "deepspeed", "datasets"]),
    ],
)
def test_importing_a_module_does_not_load_what_it_does_not_need(module: str, unwanted: list[str]) -> None:
    code = f"import sys, {module}; print(*sorted(set({unwanted}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200)
    assert (done.stdout.strip(), done.returncode) == ("", 0), done.stderr[-2000:]
