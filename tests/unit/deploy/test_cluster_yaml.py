"""`ray up` accepts cluster.yaml, which keeps the cluster closed and offers the resources that the configs ask for.

The tests work offline. They use Ray's own JSON schema, and then what `ray up` does before it calls a cloud
(prepare_config, validate_config). That schema does not check node_config, so botocore's model of EC2 checks whether
RunInstances would accept it.
"""

import copy
import functools
import json
import re
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
from botocore.loaders import Loader
from botocore.model import ServiceModel, StructureShape
from botocore.validate import ParamValidator
from ray._private.runtime_env.packaging import create_package
from ray.autoscaler._private.util import prepare_config, validate_config

REPOSITORY = Path(__file__).parents[3]
CUSTOM_RESOURCES = {
    "data": {"data"},
    "trainer": {"trainer"},
    "rollout": {"rollout"},
    "serving": {"serving"},
    "head": set[str](),
}
"""The custom resources that the stages of rm_robust may ask for, by node type."""

INSTANCES = {
    "m7i.xlarge": (4, 0),
    "m7i.4xlarge": (16, 0),
    "g6e.xlarge": (4, 1),
    "g6e.2xlarge": (8, 1),
    "g6e.12xlarge": (48, 4),
}
"""The CPUs and GPUs of an instance, by AWS's name for it."""
PORTS = {"--port": "6379", "--object-manager-port": "8076", "--metrics-export-port": "8080"}

ClusterConfig = dict[str, Any]


def load_cluster_config() -> ClusterConfig:
    config: ClusterConfig = yaml.safe_load((REPOSITORY / "cluster.yaml").read_text())
    return config


def custom_resources_by_node_type(config: ClusterConfig) -> dict[str, set[str]]:
    """Return the names of each node type's custom resources: all except CPU, GPU and memory."""
    built_in = {"CPU", "GPU", "memory", "object_store_memory"}
    return {name: set(node_type["resources"]) - built_in for name, node_type in config["available_node_types"].items()}


def check_cluster_config(config: ClusterConfig) -> None:
    """Check the file as `ray up` does before it starts anything, and raise what it would raise.

    Raises AssertionError if the resources are not those that stages ask for.
    """
    schema = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())
    jsonschema.Draft7Validator.check_schema(schema)
    jsonschema.validate(config, schema)
    validate_config(prepare_config(copy.deepcopy(config)))
    assert custom_resources_by_node_type(config) == CUSTOM_RESOURCES


@functools.cache
def run_instances() -> StructureShape:
    """Return the model of the arguments with which AWS starts an instance."""
    shape = ServiceModel(Loader().load_service_model("ec2", "service-2")).operation_model("RunInstances").input_shape
    assert isinstance(shape, StructureShape)
    return shape


def check_instances(config: ClusterConfig) -> None:
    """Check that AWS accepts every node_config, and that a node has the CPUs and GPUs that Ray is told.

    AWS must know every name and accept every type, and node_config must set everything that has no default.
    """
    for name, node_type in config["available_node_types"].items():
        node_config = node_type["node_config"]
        report = ParamValidator().validate({**node_config, "MinCount": 1, "MaxCount": 1}, run_instances())
        assert not report.has_errors(), f"{name}: {report.generate_report()}"
        assert {"ImageId", "InstanceType", "SecurityGroupIds", "BlockDeviceMappings"} <= node_config.keys()
        assert node_config["InstanceType"] in run_instances().members["InstanceType"].enum
        (disk,) = node_config["BlockDeviceMappings"]
        assert disk.keys() == {"DeviceName", "Ebs"}
        assert 100 <= disk["Ebs"]["VolumeSize"] <= 1000
        market = node_config.get("InstanceMarketOptions", {"MarketType": "on-demand"})
        assert market in ({"MarketType": "spot"}, {"MarketType": "on-demand"})
        resources = node_type["resources"]
        if name != config["head_node_type"]:
            assert (resources["CPU"], resources.get("GPU", 0)) == INSTANCES[node_config["InstanceType"]], name
            assert node_type["labels"] == {"ray.io/market-type": market["MarketType"]}, name


def options_of(command: str) -> dict[str, str]:
    return dict(re.findall(r"(--[a-z-]+)=(\S+)", command))


def check_starts(config: ClusterConfig) -> None:
    """Check the commands that start Ray.

    Workers reach the head at its port, the ports that head and workers share are the same, and a stopped job has time
    to end.
    """
    (head,) = [command for command in config["head_start_ray_commands"] if "ray start" in command]
    (worker,) = [command for command in config["worker_start_ray_commands"] if "ray start" in command]
    assert {name: options_of(head)[name] for name in PORTS} == PORTS
    assert options_of(worker).items() == {**PORTS, "--address": f"$RAY_HEAD_IP:{PORTS['--port']}"}.items() - {
        ("--port", PORTS["--port"])
    }
    assert " RAY_JOB_STOP_WAIT_TIME_S=60 RAY_AUTH_MODE=token ray start --head " in head


def check_setup(config: ClusterConfig) -> None:
    """Check that every package whose version pip may choose has the lock's version."""
    installs = [
        command
        for key in ("setup_commands", "head_setup_commands")
        for command in config[key]
        if "uv pip install" in command
    ]
    lock = "~/rm_robust_source/requirements/gpu.lock"
    assert [
        command for command in installs if "--no-deps" not in command and f"--constraint {lock}" not in command
    ] == []
    assert any(f" --no-deps -r {lock}" in command for command in installs)
    assert config["file_mounts"]["~/rm_robust_source/requirements"] == "requirements"
    assert (REPOSITORY / "requirements" / "gpu.lock").is_file()


CHECKS = (check_cluster_config, check_instances, check_starts, check_setup)


def worker_types(config: ClusterConfig) -> dict[str, ClusterConfig]:
    return {
        name: node_type
        for name, node_type in config["available_node_types"].items()
        if name != config["head_node_type"]
    }


def all_strings(value: object) -> list[str]:
    if isinstance(value, dict):
        return [text for pair in value.items() for part in pair for text in all_strings(part)]
    if isinstance(value, list):
        return [text for part in value for text in all_strings(part)]
    return [value] if isinstance(value, str) else []


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_the_file_holds(check: Callable[[ClusterConfig], None]) -> None:
    check(load_cluster_config())


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
def test_a_broken_file_is_refused(
    mutate: Callable[[ClusterConfig], None], error: type[Exception] | tuple[type[Exception], ...]
) -> None:
    config = load_cluster_config()
    mutate(config)
    with pytest.raises(error):
        check_cluster_config(config)


REMOVED = object()
TYPES = "available_node_types"
MUTATIONS: list[tuple[Callable[[ClusterConfig], None], str, str, object]] = [
    (check_instances, f"{TYPES} trainer node_config", "ImageId", "ImagId"),  # the last entry is the key's new name
    (check_instances, f"{TYPES} trainer node_config", "BlockDeviceMappings", "BlockDeviceMapping"),
    (check_instances, f"{TYPES} data node_config", "InstanceMarketOptions", "MarketOptions"),
    (check_instances, f"{TYPES} data node_config InstanceMarketOptions", "MarketType", "Market"),
    (check_instances, f"{TYPES} head node_config BlockDeviceMappings 0 Ebs", "VolumeSize", "Size"),
    (check_instances, f"{TYPES} head node_config", "ImageId", REMOVED),
    (check_instances, f"{TYPES} head node_config BlockDeviceMappings 0", "Ebs", REMOVED),
    (check_instances, f"{TYPES} data labels", "ray.io/market-type", REMOVED),
    (check_setup, "file_mounts", "~/rm_robust_source/requirements", REMOVED),
]
REPLACEMENTS: list[tuple[Callable[[ClusterConfig], None], str, str]] = [
    (check_instances, "InstanceType: m7i.4xlarge", "InstanceType: m7i.2xlarge"),
    (check_instances, "InstanceType: g6e.12xlarge", "InstanceType: g6e.13xlarge"),
    (check_instances, "resources: {CPU: 16, data: 16}", "resources: {CPU: 32, data: 32}"),
    (check_instances, "GPU: 4, trainer: 4", "GPU: 8, trainer: 8"),
    (check_instances, "VolumeSize: 300", 'VolumeSize: "300"'),
    (check_instances, "{MarketType: spot}", "{MarketType: spots}"),
    (check_instances, "market-type: spot}", "market-type: on-demand}"),
    (check_starts, "--port=6379", "--port=6380"),
    (check_starts, "$RAY_HEAD_IP:6379", "$RAY_HEAD_IP:6380"),
    (check_starts, "$RAY_HEAD_IP:6379", "$RAY_HEAD_I:6379"),
    (check_starts, "--port=6379 --object-manager-port=8076", "--port=6379 --object-manager-port=8077"),
    (check_starts, "8076 --metrics-export-port=8080 --dashboard", "8076 --dashboard"),
    (
        check_starts,
        ":6379 --object-manager-port=8076 --metrics-export-port=8080",
        ":6379 --object-manager-port=8076 --metrics-export-port=8081",
    ),
    (check_starts, "RAY_JOB_STOP_WAIT_TIME_S=60 ", ""),
    (check_setup, "--no-deps -r ~/rm_robust_source/requirements/gpu.lock", '-e "$HOME/rm_robust_source[gpu]"'),
    (check_setup, "--no-deps --no-build-isolation", "--no-build-isolation"),
    (check_setup, "--constraint ~/rm_robust_source/requirements/gpu.lock boto3", "boto3"),
    (check_setup, "requirements/gpu.lock", "requirements/gpus.lock"),
]


@pytest.mark.parametrize(("check", "path", "key", "new"), MUTATIONS)
def test_a_wrong_name_is_refused(check: Callable[[ClusterConfig], None], path: str, key: str, new: object) -> None:
    config: Any = load_cluster_config()
    parent = config
    for part in path.split():
        parent = parent[int(part)] if part.isdigit() else parent[part]
    value = parent.pop(key)
    if isinstance(new, str):
        parent[new] = value
    with pytest.raises((AssertionError, KeyError)):
        check(config)


@pytest.mark.parametrize(("check", "old", "new"), REPLACEMENTS)
def test_a_wrong_value_is_refused(check: Callable[[ClusterConfig], None], old: str, new: str) -> None:
    text = (REPOSITORY / "cluster.yaml").read_text()
    at = text.rindex(old)  # the last one, because the comments at the head of the file may have it too
    with pytest.raises((AssertionError, KeyError, ValueError)):
        check(yaml.safe_load(text[:at] + new + text[at + len(old) :]))


def test_an_on_premise_cluster_is_made_of_the_file_as_its_head_says() -> None:
    config = load_cluster_config()
    for name in (TYPES, "head_node_type", "max_workers", "metadata"):
        del config[name]
    config["provider"] = {"type": "local", "head_ip": "10.0.0.1", "worker_ips": ["10.0.0.2", "10.0.0.3"]}
    jsonschema.validate(config, json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text()))
    prepared = prepare_config(config)
    validate_config(prepared)
    (only,) = prepared[TYPES].values()
    assert (only["min_workers"], only["max_workers"], only["resources"]) == (2, 2, {}), (
        "all machines stay up, and state their resources themselves"
    )


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


def with_roles(profile: str) -> ClusterConfig:
    """Return the file with the comments removed that hide the nodes' roles."""
    text, count = re.subn(
        r"^( +)# (IamInstanceProfile: )\{Name: \w+\}",
        rf"\1\2{profile}",
        (REPOSITORY / "cluster.yaml").read_text(),
        flags=re.MULTILINE,
    )
    assert count > 0
    config: ClusterConfig = yaml.safe_load(text)
    return config


def test_every_worker_has_a_role_for_runs_in_an_object_store_once_the_comments_are_taken_away() -> None:
    """Ray gives a role to the head alone (_configure_iam_role), and only if the file gives it none."""
    config = with_roles("{Name: bucket}")
    for check in CHECKS:
        check(config)
    given = {
        name
        for name, node_type in config[TYPES].items()
        if node_type["node_config"].get("IamInstanceProfile") == {"Name": "bucket"}
    }
    assert given == worker_types(config).keys()
    assert "IamInstanceProfile" not in all_strings(load_cluster_config()), (
        "a name that AWS does not know would start no node"
    )
    with pytest.raises(AssertionError, match="IamInstanceProfile"):
        check_instances(with_roles("{Nam: bucket}"))


def test_one_unit_of_a_custom_resource_is_one_gpu_or_on_data_nodes_one_cpu() -> None:
    for name, node_type in worker_types(load_cluster_config()).items():
        resources = node_type["resources"]
        assert resources[name] == (resources["CPU"] if name == "data" else resources["GPU"])


def test_only_data_and_generation_run_on_spot() -> None:
    types = load_cluster_config()["available_node_types"]
    assert {name for name, node_type in types.items() if "InstanceMarketOptions" in node_type["node_config"]} == {
        "data",
        "rollout",
    }


def test_every_ray_start_has_the_token_on_and_the_token_comes_from_the_users_home() -> None:
    config = load_cluster_config()
    starts = [
        command
        for key in ("head_start_ray_commands", "worker_start_ray_commands")
        for command in config[key]
        if "ray start" in command
    ]
    assert len(starts) == 2
    assert all("RAY_AUTH_MODE=token ray start" in command for command in starts)
    assert all(len(command.splitlines()) == 1 for command in starts)
    assert config["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    assert "RAY_AUTH_TOKEN=" not in (REPOSITORY / "cluster.yaml").read_text()


def test_no_port_is_open_to_the_world() -> None:
    """Without SecurityGroupIds, Ray makes a group that admits SSH from 0.0.0.0/0.

    Its default start command binds the dashboard to all addresses.
    """
    config = load_cluster_config()
    assert all(node_type["node_config"]["SecurityGroupIds"] for node_type in config["available_node_types"].values())
    assert not [text for text in all_strings(config) if "0.0.0.0" in text]
    assert "--dashboard-host=127.0.0.1" in " ".join(config["head_start_ray_commands"])


def test_everything_that_is_mounted_exists_and_the_whole_repository_is_not() -> None:
    local_paths = [local for remote, local in load_cluster_config()["file_mounts"].items() if local != remote]
    assert "." not in local_paths
    assert [path for path in local_paths if not (REPOSITORY / path).exists()] == []


def test_the_file_names_the_ray_version_that_the_package_pins() -> None:
    extras = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    (version,) = [entry.split("==")[1] for entry in extras["pipeline"] if entry.startswith("ray[")]
    text = (REPOSITORY / "cluster.yaml").read_text()
    assert f"rayproject/ray:{version}-py311-gpu" in text
    assert f"Ray {version.rsplit('.', 1)[0]}" in text


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_every_command_is_valid_shell() -> None:
    config = load_cluster_config()
    keys = (
        "setup_commands",
        "head_setup_commands",
        "worker_setup_commands",
        "head_start_ray_commands",
        "worker_start_ray_commands",
    )
    for command in (command for key in keys for command in config[key]):
        check = subprocess.run(["bash", "-n", "-c", command], capture_output=True, text=True, timeout=30)
        assert check.returncode == 0, f"{command}: {check.stderr}"


def test_a_job_upload_leaves_environments_runs_weights_and_bench_results_behind(tmp_path: Path) -> None:
    source, package = tmp_path / "repository", tmp_path / "package.zip"
    kept = [
        "pipelines/full_rlhf.py",
        "pipelines/configs/smoke.toml",
        "rm_robust/rloo/controller.py",
        "serve/app.py",
        "data/pairs.jsonl",
    ]
    left_out = [
        ".git/objects/aa", ".venv/bin/python", "runs/tiny_cpu/metrics.jsonl", "research/bench/results/table.json",
        "models/model.safetensors", "rm_robust/__pycache__/config.pyc", ".mypy_cache/x.json",
    ]  # fmt: skip
    for name in kept + left_out:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text("x")
    shutil.copy(REPOSITORY / ".rayignore", source)
    create_package(str(source), package, include_parent_dir=False, include_gitignore=True, excludes=[])
    with zipfile.ZipFile(package) as archive:
        files = {name for name in archive.namelist() if not name.endswith("/")}
    assert files == {*kept, ".rayignore"}
