"""A cluster that can never run a config is refused before any work starts, and one that can grow enough is not."""

import math
import os
from pathlib import Path
from typing import Any

import pytest
import requests as http
import yaml
from ray.autoscaler._private.kuberay import node_provider
from ray.autoscaler._private.local.config import prepare_local

from pipelines.stages import REWARD_MODEL, RLOO, requests_of
from rm_robust.cluster import capacity as cluster_capacity
from rm_robust.cluster.capacity import (
    NodeType,
    ResourceRequest,
    check_capacity,
    kubernetes_config,
    node_types_of,
    shortages_of,
)
from rm_robust.config.loading import load_config
from rm_robust.errors import ClusterError

CONFIGS = Path("pipelines/configs")
GPU_NODE = {"CPU": 48.0, "GPU": 4.0, "trainer": 4.0}


def test_each_stage_asks_for_what_its_section_says() -> None:
    requests = requests_of(load_config(CONFIGS / "full_rlhf.toml", []))
    assert [str(request) for request in requests["reward_model"]] == [
        "8 x {CPU: 8, GPU: 1, trainer: 1} (reward_model.workers.num_workers)"
    ]
    assert [str(request) for request in requests["preferences"]] == ["1 x {CPU: 1, data: 1} (data.task_resources)"]
    assert [(request.setting, request.count) for request in requests["rloo"]] == [
        ("rloo.trainers.num_workers", 4),
        ("rloo.num_engines", 4),
        ("serve.proxy_replica.num_replicas", 2),
        ("serve.gold_replica.num_replicas", 2),
    ]
    # A judge behind a URL has no replicas on this cluster.
    assert len(requests_of(load_config(CONFIGS / "full_rlhf.toml", ['serve.gold="http://gold"']))["rloo"]) == 3
    assert requests_of(load_config(CONFIGS / "full_rlhf.toml", ["sft.enabled=false"]))["sft"] == []


def test_a_request_fits_when_the_nodes_that_may_come_hold_it() -> None:
    eight = [ResourceRequest("workers", 8, {"CPU": 8.0, "GPU": 1.0, "trainer": 1.0})]
    assert shortages_of("sft", eight, [NodeType("trainer", GPU_NODE, 2)]) == []
    assert shortages_of("sft", eight, [NodeType("trainer", GPU_NODE, math.inf)]) == []
    (line,) = shortages_of("sft", eight, [NodeType("trainer", GPU_NODE, 1), NodeType("data", {"CPU": 16.0}, 5)])
    assert line == (
        "sft asks for 8 x {CPU: 8, GPU: 1, trainer: 1} (workers), the cluster's maximum is 4 of them: "
        "lower workers, or add nodes"
    )


def test_one_process_never_spans_two_nodes() -> None:
    (line,) = shortages_of("sft", [ResourceRequest("workers", 1, {"CPU": 3.0})], [NodeType("a", {"CPU": 2.0}, 10)])
    assert "the cluster's maximum is 0 of them" in line


def test_all_processes_of_a_stage_must_fit_at_the_same_time() -> None:
    requests = [
        ResourceRequest("trainers", 1, {"CPU": 1.0}),
        ResourceRequest("engines", 1, {"CPU": 0.5}),
        ResourceRequest("replicas", 2, {"CPU": 0.25}),
    ]
    assert shortages_of("rloo", requests, [NodeType("laptop", {"CPU": 2.0}, 1)]) == []
    (line,) = shortages_of("rloo", requests, [NodeType("laptop", {"CPU": 1.0}, 1)])
    assert line.startswith(
        "rloo asks for 2 CPU at once, the cluster's maximum is 1: 1 x {CPU: 1} (trainers), 1 x {CPU: 0.5} (engines)"
    )


def test_fractions_add_up_without_rounding_errors() -> None:
    requests = [ResourceRequest("a", 7, {"CPU": 0.1}), ResourceRequest("b", 3, {"CPU": 0.1})]
    assert shortages_of("rloo", requests, [NodeType("laptop", {"CPU": 1.0}, 1)]) == []


@pytest.fixture
def set_nodes(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that sets the nodes of the cluster."""

    def replace_nodes(*node_types: NodeType) -> None:
        monkeypatch.setattr("rm_robust.cluster.capacity.find_node_types", lambda: list(node_types))

    return replace_nodes


def test_the_message_names_every_stage_the_values_and_what_there_is(set_nodes: Any) -> None:
    set_nodes(NodeType("trainer", GPU_NODE, 1))
    config = load_config(CONFIGS / "full_rlhf.toml", ["rloo.num_engines=1"])
    with pytest.raises(ClusterError) as failure:
        check_capacity(
            requests_of(config, [REWARD_MODEL, RLOO]), beside=[ResourceRequest("the driver", 1, {"CPU": 1.0})]
        )
    message = str(failure.value)
    assert (
        "reward_model asks for 8 x {CPU: 8, GPU: 1, trainer: 1} (reward_model.workers.num_workers), "
        "the cluster's maximum is 4 of them" in message
    )
    assert (
        "rloo asks for 1 x {CPU: 3, GPU: 1, rollout: 1} (rloo.num_engines), the cluster's maximum is 0 of them"
        in message
    )
    assert message.endswith("At most it has 1 x {CPU: 48, GPU: 4, trainer: 4}.")


def test_a_cluster_that_is_large_enough_passes_and_one_with_unknown_limits_is_not_refused(
    set_nodes: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    smoke = load_config(CONFIGS / "smoke.toml", [])
    set_nodes(NodeType("laptop", {"CPU": 2.0}, 1))
    check_capacity(requests_of(smoke))
    monkeypatch.setattr("rm_robust.cluster.capacity.find_node_types", lambda: None)
    check_capacity(requests_of(load_config(CONFIGS / "full_rlhf.toml", []), [REWARD_MODEL]))


def test_the_kinds_of_cluster_yaml_are_found_and_its_head_offers_nothing() -> None:
    config = yaml.safe_load(Path("cluster.yaml").read_text())
    node_types = node_types_of(config, alive=[])
    assert node_types is not None
    assert {node.name: node.max_count for node in node_types} == {"data": 8, "trainer": 2, "rollout": 8, "serving": 4}
    config["max_workers"] = 3
    assert max(node.max_count for node in node_types_of(config, alive=[]) or []) == 3


def test_machines_that_state_their_own_resources_count_once_all_are_there() -> None:
    settings = {
        "cluster_name": "own",
        "provider": {"type": "local", "head_ip": "10.0.0.1", "worker_ips": ["10.0.0.2", "10.0.0.3"]},
    }
    config, _ = prepare_local(settings)
    nodes = [NodeType("head", {}, 1), NodeType("a", GPU_NODE, 1), NodeType("b", {"CPU": 16.0}, 1)]
    assert node_types_of(config, nodes[:2]) is None
    assert node_types_of(config, nodes) == nodes[1:]


@pytest.fixture
def pod(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Make this process look as if it ran on the head of deploy/ray_cluster.yaml; return the file of its namespace."""
    namespace = tmp_path / "namespace"
    namespace.write_text("rm-robust\n")
    cluster = yaml.safe_load(Path("deploy/ray_cluster.yaml").read_text())
    clusters = {f"rm-robust/rayclusters/{cluster['metadata']['name']}": cluster}

    def get(api: node_provider.KubernetesHttpApiClient, path: str) -> dict[str, Any]:
        if f"{api._namespace}/{path}" not in clusters:
            raise http.HTTPError("403 Forbidden")
        return clusters[f"{api._namespace}/{path}"]

    monkeypatch.setattr(cluster_capacity, "POD_NAMESPACE", namespace)
    monkeypatch.setattr(node_provider.KubernetesHttpApiClient, "get", get)
    monkeypatch.setitem(os.environ, "RAY_CLUSTER_NAME", cluster["metadata"]["name"])
    return namespace


def test_the_limits_of_kuberays_autoscaler_are_those_of_the_raycluster(pod: Path) -> None:
    config = kubernetes_config()
    assert config is not None
    node_types = node_types_of(config, alive=[])
    assert node_types is not None
    assert {node.name for node in node_types} == {"data", "trainer", "rollout", "serving"}
    full = load_config(CONFIGS / "full_rlhf.toml", [])
    assert [
        line for stage, requests in requests_of(full).items() for line in shortages_of(stage, requests, node_types)
    ] == []
    too_many = load_config(CONFIGS / "full_rlhf.toml", ["rloo.num_engines=99"])
    (line,) = shortages_of("rloo", requests_of(too_many)["rloo"], node_types)
    assert "lower rloo.num_engines" in line


def test_a_raycluster_that_may_not_be_read_is_no_limit(pod: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pod.write_text("elsewhere")
    assert kubernetes_config() is None
    monkeypatch.delitem(os.environ, "RAY_CLUSTER_NAME")
    assert kubernetes_config() is None
    pod.unlink()
    assert kubernetes_config() is None
