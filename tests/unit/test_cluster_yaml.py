"""cluster.yaml is a file that `ray up` accepts, keeps the cluster closed, and offers the resources that the configs ask for.

Offline: Ray's own JSON schema, then what `ray up` does before it calls a cloud (prepare_config, validate_config).
"""

import copy
import json
import shutil
import subprocess
import tomllib
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray.autoscaler
import yaml
from ray._private.runtime_env.packaging import create_package
from ray.autoscaler._private.util import prepare_config, validate_config

REPOSITORY = Path(__file__).parents[2]
CUSTOM_RESOURCES = {"data": {"data"}, "trainer": {"trainer"}, "rollout": {"rollout"}, "serving": {"serving"}, "head": set[str]()}
"""What rm_robust's stages may ask for, by node type."""

ClusterConfig = dict[str, Any]


def load_cluster_config() -> ClusterConfig:
    config: ClusterConfig = yaml.safe_load((REPOSITORY / "cluster.yaml").read_text())
    return config


def custom_resources_by_node_type(config: ClusterConfig) -> dict[str, set[str]]:
    """Node type -> names of its custom resources (all but CPU, GPU and memory)."""
    built_in = {"CPU", "GPU", "memory", "object_store_memory"}
    return {name: set(node_type["resources"]) - built_in for name, node_type in config["available_node_types"].items()}


def check_cluster_config(config: ClusterConfig) -> None:
    """Raises what `ray up` would raise before it starts anything, or AssertionError when the resources are not the ones stages ask for."""
    schema = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())
    jsonschema.Draft7Validator.check_schema(schema)
    jsonschema.validate(config, schema)
    validate_config(prepare_config(copy.deepcopy(config)))
    assert custom_resources_by_node_type(config) == CUSTOM_RESOURCES


def worker_types(config: ClusterConfig) -> dict[str, ClusterConfig]:
    return {name: node_type for name, node_type in config["available_node_types"].items() if name != config["head_node_type"]}


def all_strings(value: object) -> list[str]:
    if isinstance(value, dict):
        return [text for pair in value.items() for part in pair for text in all_strings(part)]
    if isinstance(value, list):
        return [text for part in value for text in all_strings(part)]
    return [value] if isinstance(value, str) else []


def test_ray_accepts_the_file() -> None:
    check_cluster_config(load_cluster_config())


def typo_in_a_top_key(config: ClusterConfig) -> None:
    config["idle_timeout_minute"] = config.pop("idle_timeout_minutes")


def typo_in_a_node_type_key(config: ClusterConfig) -> None:
    config["available_node_types"]["trainer"]["max_worker"] = 3


def fractional_resource(config: ClusterConfig) -> None:
    config["available_node_types"]["trainer"]["resources"]["trainer"] = 0.5


def no_provider(config: ClusterConfig) -> None:
    del config["provider"]


def head_type_that_does_not_exist(config: ClusterConfig) -> None:
    config["head_node_type"] = "heads"


def more_minimum_workers_than_allowed(config: ClusterConfig) -> None:
    config["available_node_types"]["data"]["min_workers"] = config["max_workers"] + 1


def misspelt_resource(config: ClusterConfig) -> None:
    resources = config["available_node_types"]["trainer"]["resources"]
    resources["trainr"] = resources.pop("trainer")


def resource_on_the_head(config: ClusterConfig) -> None:
    config["available_node_types"]["head"]["resources"]["data"] = 4


@pytest.mark.parametrize(
    ("mutate", "error"),
    [
        (typo_in_a_top_key, jsonschema.ValidationError),
        (typo_in_a_node_type_key, jsonschema.ValidationError),
        (fractional_resource, jsonschema.ValidationError),
        (no_provider, jsonschema.ValidationError),
        (head_type_that_does_not_exist, (KeyError, ValueError)),
        (more_minimum_workers_than_allowed, ValueError),
        (misspelt_resource, AssertionError),
        (resource_on_the_head, AssertionError),
    ],
)
def test_a_broken_file_is_refused(mutate: Callable[[ClusterConfig], None], error: type[Exception] | tuple[type[Exception], ...]) -> None:
    config = load_cluster_config()
    mutate(config)
    with pytest.raises(error):
        check_cluster_config(config)


def test_the_head_does_no_work() -> None:
    config = load_cluster_config()
    head = config["available_node_types"][config["head_node_type"]]
    assert head["resources"] == {"CPU": 0}
    assert head["max_workers"] == 0


def test_every_worker_type_scales_to_zero_and_has_a_bound_and_an_idle_timeout() -> None:
    config = load_cluster_config()
    workers = worker_types(config)
    for node_type in workers.values():
        assert node_type["min_workers"] == 0
        assert 1 <= node_type["max_workers"] <= 16
        assert 60 <= node_type["idle_timeout_s"] <= 1800
    assert config["max_workers"] == sum(node_type["max_workers"] for node_type in workers.values())


def test_one_unit_of_a_custom_resource_is_one_gpu_or_on_data_nodes_one_cpu() -> None:
    for name, node_type in worker_types(load_cluster_config()).items():
        resources = node_type["resources"]
        assert resources[name] == (resources["CPU"] if name == "data" else resources["GPU"])


def test_only_data_and_generation_run_on_spot() -> None:
    types = load_cluster_config()["available_node_types"]
    assert {name for name, node_type in types.items() if "InstanceMarketOptions" in node_type["node_config"]} == {"data", "rollout"}


def test_every_ray_start_has_the_token_on_and_the_token_comes_from_the_users_home() -> None:
    config = load_cluster_config()
    starts = [command for key in ("head_start_ray_commands", "worker_start_ray_commands") for command in config[key] if "ray start" in command]
    assert len(starts) == 2
    assert all("RAY_AUTH_MODE=token ray start" in command for command in starts)
    assert config["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    assert "RAY_AUTH_TOKEN=" not in (REPOSITORY / "cluster.yaml").read_text()


def test_no_port_is_open_to_the_world() -> None:
    """Without SecurityGroupIds, Ray makes a group that admits SSH from 0.0.0.0/0; its default start command binds the dashboard to all."""
    config = load_cluster_config()
    assert all(node_type["node_config"]["SecurityGroupIds"] for node_type in config["available_node_types"].values())
    assert not [text for text in all_strings(config) if "0.0.0.0" in text]
    assert "--dashboard-host=127.0.0.1" in " ".join(config["head_start_ray_commands"])


def test_everything_that_is_mounted_exists_and_the_whole_repository_is_not() -> None:
    local_paths = [local for remote, local in load_cluster_config()["file_mounts"].items() if local != remote]
    assert "." not in local_paths
    assert [path for path in local_paths if not (REPOSITORY / path).exists()] == []


def test_the_file_names_the_ray_version_that_the_package_pins() -> None:
    dependencies = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["dependencies"]
    (version,) = [entry.split("==")[1] for entry in dependencies if entry.startswith("ray[")]
    text = (REPOSITORY / "cluster.yaml").read_text()
    assert f"rayproject/ray:{version}-py311-gpu" in text
    assert f"Ray {version.rsplit('.', 1)[0]}" in text


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_every_command_is_valid_shell() -> None:
    config = load_cluster_config()
    keys = ("setup_commands", "head_setup_commands", "worker_setup_commands", "head_start_ray_commands", "worker_start_ray_commands")
    for command in (command for key in keys for command in config[key]):
        check = subprocess.run(["bash", "-n", "-c", command], capture_output=True, text=True, timeout=30)
        assert check.returncode == 0, f"{command}: {check.stderr}"


def test_a_job_upload_leaves_environments_runs_weights_and_bench_results_behind(tmp_path: Path) -> None:
    source, package = tmp_path / "repository", tmp_path / "package.zip"
    kept = ["pipelines/full_rlhf.py", "pipelines/configs/smoke.toml", "rm_robust/rloo/controller.py", "serve/app.py", "data/pairs.jsonl"]
    left = [
        ".git/objects/aa", ".venv/bin/python", "runs/tiny_cpu/metrics.jsonl", "tests/bench/results/table.json", "models/model.safetensors",
        "rm_robust/__pycache__/config.pyc", ".mypy_cache/x.json",
    ]  # fmt: skip
    for name in kept + left:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text("x")
    shutil.copy(REPOSITORY / ".rayignore", source)
    create_package(str(source), package, include_parent_dir=False, include_gitignore=True, excludes=[])
    with zipfile.ZipFile(package) as archive:
        files = {name for name in archive.namelist() if not name.endswith("/")}
    assert files == {*kept, ".rayignore"}
