"""What the stages of a run ask of a Ray cluster, and whether it can ever give that: asked before any work starts.

Without this check Ray waits for ever for a GPU that no node has: a cluster may be about to grow, so to Ray no request is too large.
"""

import contextlib
import logging
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import ray
import yaml

from rm_robust.cluster.session import is_on_head
from rm_robust.config.run import PipelineConfig, ReplicaConfig
from rm_robust.config.shared import WorkersConfig
from rm_robust.errors import ClusterError

logger = logging.getLogger(__name__)

POD_NAMESPACE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
"""Written by Kubernetes."""
NOT_FOR_WORK = ("memory", "object_store_memory")
"""Resources of a node that no stage asks for."""


@dataclass(frozen=True)
class Request:
    """`count` processes, each on one node with `resources`; those of a stage are there at once."""

    setting: str
    """Of the config that says how many."""
    count: int
    resources: Mapping[str, float]

    def __str__(self) -> str:
        return f"{self.count} x {_shown(self.resources)} ({self.setting})"


@dataclass(frozen=True)
class NodeType:
    """Nodes of one kind: those that are there, or those that the autoscaler may start."""

    name: str
    resources: Mapping[str, float]
    max_count: float
    """math.inf: without bound."""


def requests_of(config: PipelineConfig) -> dict[str, list[Request]]:
    """By stage, in the order in which they run."""
    rloo = config.rloo
    rloo_requests = [
        _of_workers("rloo.trainers.num_workers", rloo.trainers),
        _request(
            "rloo.num_engines", rloo.num_engines, rloo.engine_num_cpus, rloo.engine_num_gpus, rloo.engine_resources
        ),
        _of_replicas("serve.proxy_replica.num_replicas", config.serve.proxy_replica),
    ]
    if config.serve.gold_url is None:
        rloo_requests.append(_of_replicas("serve.gold_replica.num_replicas", config.serve.gold_replica))
    evaluation = config.evaluation
    return {
        "sft": [_of_workers("sft.workers.num_workers", config.sft.workers)] if config.sft.enabled else [],
        "preferences": [_request("data.task_resources", 1, 1.0, 0.0, config.data.task_resources)],
        "reward_model": [_of_workers("reward_model.workers.num_workers", config.reward_model.workers)],
        "evaluation": [_request("evaluation", 1, evaluation.num_cpus, evaluation.num_gpus, evaluation.resources)],
        "rloo": rloo_requests,
    }


def check_capacity(config: PipelineConfig, stages: Sequence[str], *, beside: Sequence[Request] = ()) -> None:
    """Raise ClusterError when the cluster can never run one of the stages, with what is there `beside` each; the caller is connected to Ray."""
    node_types = find_node_types()
    if node_types is None:
        logger.info(
            "the limits of this cluster's autoscaler cannot be read here: whether they are enough shows when the stages ask for nodes"
        )
        return
    wanted = requests_of(config)
    shortages = [
        line for stage in stages for line in shortages_of(stage, [*wanted.get(stage, []), *beside], node_types)
    ]
    if shortages:
        has = (
            "; ".join(f"{_bound(node.max_count)} x {_shown(node.resources)}" for node in node_types)
            or "no node for work"
        )
        raise ClusterError(
            "This cluster can never run what the config asks for:\n  "
            + "\n  ".join(shortages)
            + f"\nAt most it has {has}."
        )


def shortages_of(stage: str, requests: Sequence[Request], node_types: Sequence[NodeType]) -> list[str]:
    """One line for each request that does not fit whatever the cluster does, or for a resource of which all together ask for too much."""
    lines = []
    for request in requests:
        room = sum(
            _copies(request.resources, node.resources) * node.max_count
            for node in node_types
            if _copies(request.resources, node.resources)
        )
        if room < request.count:
            lines.append(
                f"{stage} asks for {request}, the cluster's maximum is {_bound(room)} of them: lower {request.setting}, or add nodes"
            )
    if not lines:
        for name in sorted({name for request in requests for name in request.resources}):
            asked = math.fsum(request.count * request.resources.get(name, 0.0) for request in requests)
            most = math.fsum(node.max_count * node.resources[name] for node in node_types if node.resources.get(name))
            if asked > most + 1e-9:
                parts = ", ".join(str(request) for request in requests if request.resources.get(name))
                lines.append(
                    f"{stage} asks for {asked:g} {name} at once, the cluster's maximum is {_bound(most)}: {parts}"
                )
    return lines


def find_node_types() -> list[NodeType] | None:
    """What the autoscaler may start, or where there is none the nodes that are there. None: an autoscaler may run whose limits cannot be read from here."""
    if not is_on_head():
        return None
    alive = [NodeType(node["NodeName"], _for_work(node["Resources"]), 1) for node in ray.nodes() if node["Alive"]]
    path = autoscaler_config()
    if path is not None:
        return node_types_of(yaml.safe_load(path.read_text()), alive)
    if "KUBERNETES_SERVICE_HOST" in os.environ:
        config = kubernetes_config()
        return None if config is None else node_types_of(config, alive)
    return _of_use(alive)


def node_types_of(config: Mapping[str, Any], alive: Sequence[NodeType]) -> list[NodeType] | None:
    """Of an autoscaler's config. `alive` instead, once all are there, where its nodes say themselves what they have (provider: local)."""
    head, types = config.get("head_node_type"), config["available_node_types"]
    most = float(config.get("max_workers", math.inf))
    if any(not own.get("resources") for own in types.values()):
        return _of_use(alive) if len(alive) > most else None
    return _of_use(
        [
            NodeType(
                name, _for_work(own["resources"]), 1 if name == head else min(most, float(own.get("max_workers", most)))
            )
            for name, own in types.items()
        ]
    )


def _of_use(node_types: Sequence[NodeType]) -> list[NodeType]:
    return [node for node in node_types if node.resources and node.max_count]


def kubernetes_config() -> dict[str, Any] | None:
    """Of KubeRay's autoscaler, derived as it derives it from the RayCluster that this pod belongs to. None, with a log line, where that may not be read."""
    from ray.autoscaler._private.kuberay import autoscaling_config, node_provider

    try:
        api = node_provider.KubernetesHttpApiClient(namespace=POD_NAMESPACE.read_text().strip())
        cluster = api.get(f"rayclusters/{os.environ['RAY_CLUSTER_NAME']}")
    except (OSError, KeyError) as error:  # requests' errors are OSErrors
        logger.info("the RayCluster of this pod cannot be read: %r", error)
        return None
    config: dict[str, Any] = autoscaling_config._derive_autoscaling_config_from_ray_cr(cluster)
    return config


def autoscaler_config() -> Path | None:
    """Of the autoscaler that runs on this machine (`ray up` starts it beside the head, where jobs have their driver); None where there is none."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            for argument in process.cmdline():
                if argument.startswith("--autoscaling-config=") and _monitors_this_cluster(process):
                    return Path(argument.partition("=")[2]).expanduser()
    return None


def _monitors_this_cluster(process: psutil.Process) -> bool:
    address = ray.get_runtime_context().gcs_address
    return any(argument == f"--gcs-address={address}" for argument in process.cmdline())


def _of_workers(setting: str, workers: WorkersConfig) -> Request:
    return _request(
        setting, workers.fewest, workers.num_cpus_per_worker, workers.num_gpus_per_worker, workers.resources_per_worker
    )


def _of_replicas(setting: str, replica: ReplicaConfig) -> Request:
    return _request(setting, replica.num_replicas, replica.num_cpus, replica.num_gpus, replica.resources)


def _request(setting: str, count: int, num_cpus: float, num_gpus: float, resources: Mapping[str, float]) -> Request:
    return Request(
        setting,
        count,
        {name: amount for name, amount in {"CPU": num_cpus, "GPU": num_gpus, **resources}.items() if amount},
    )


def _for_work(resources: Mapping[str, float]) -> dict[str, float]:
    return {
        name: float(amount)
        for name, amount in resources.items()
        if name not in NOT_FOR_WORK and ":" not in name and amount
    }


def _copies(wanted: Mapping[str, float], offered: Mapping[str, float]) -> float:
    """How many of the processes one node holds."""
    return min(
        (math.floor(offered.get(name, 0.0) / amount + 1e-9) for name, amount in wanted.items()), default=math.inf
    )


def _bound(count: float) -> str:
    return "any number" if count == math.inf else f"{count:g}"


def _shown(resources: Mapping[str, float]) -> str:
    return "{" + ", ".join(f"{name}: {amount:g}" for name, amount in sorted(resources.items())) + "}"
