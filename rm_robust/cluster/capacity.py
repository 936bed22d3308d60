"""Check before any work starts that a Ray cluster can ever run what the stages of a run ask for.

Without this check Ray waits for ever for a GPU that no node has. A cluster may be about to grow, so Ray refuses no
request as too large.
"""

import contextlib
import logging
import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import ray
import yaml
from ray.util.debug import log_once

from rm_robust.cluster.session import is_on_head
from rm_robust.config.run import ReplicaConfig
from rm_robust.config.shared import WorkersConfig
from rm_robust.errors import ClusterError

logger = logging.getLogger(__name__)

POD_NAMESPACE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
"""The file in which Kubernetes writes a pod's namespace."""
WAITING_SAID_EVERY_S = 30.0
NOT_FOR_WORK = ("memory", "object_store_memory")
"""Resources of a node that no stage asks for."""


@dataclass(frozen=True)
class ResourceRequest:
    """`count` processes that each need `resources` on one node. The processes of a stage run at the same time."""

    setting: str
    """The setting of the config that says how many processes there are."""
    count: int
    resources: Mapping[str, float]

    def __str__(self) -> str:
        return f"{self.count} x {_shown(self.resources)} ({self.setting})"


@dataclass(frozen=True)
class NodeType:
    """Nodes of one kind: those that exist, or those that the autoscaler may start."""

    name: str
    resources: Mapping[str, float]
    max_count: float
    """Largest number of these nodes. math.inf: without bound."""


def request_of_workers(setting: str, workers: WorkersConfig) -> ResourceRequest:
    """Return what a worker group needs at least. `setting` is the setting that says how many workers there are."""
    return request_of(
        setting, workers.fewest, workers.num_cpus_per_worker, workers.num_gpus_per_worker, workers.resources_per_worker
    )


def request_of_replicas(setting: str, replica: ReplicaConfig) -> ResourceRequest:
    """Return what the replicas of a served model need. `setting` is the setting that says how many there are."""
    return request_of(setting, replica.num_replicas, replica.num_cpus, replica.num_gpus, replica.resources)


def request_of(
    setting: str, count: int, num_cpus: float, num_gpus: float, resources: Mapping[str, float]
) -> ResourceRequest:
    """Return the request for `count` processes that each need these resources; an amount of 0 is left out."""
    amounts = {"CPU": num_cpus, "GPU": num_gpus, **resources}
    return ResourceRequest(setting, count, {name: amount for name, amount in amounts.items() if amount})


def check_capacity(
    requests: Mapping[str, Sequence[ResourceRequest]], *, beside: Sequence[ResourceRequest] = ()
) -> None:
    """Raise ClusterError when the cluster can never run one of the stages together with the processes `beside` it.

    `requests` are those of each stage, by its name. The caller is connected to Ray.
    """
    node_types = find_node_types()
    if node_types is None:
        logger.info(
            "the limits of this cluster's autoscaler cannot be read here: too large a request shows only when a stage "
            "waits for its nodes"
        )
        return
    shortages = [
        line for stage, asked in requests.items() for line in shortages_of(stage, [*asked, *beside], node_types)
    ]
    if shortages:
        maximum = (
            "; ".join(f"{_bound(node.max_count)} x {_shown(node.resources)}" for node in node_types)
            or "no node for work"
        )
        raise ClusterError(
            "This cluster can never run what the config asks for:\n  "
            + "\n  ".join(shortages)
            + f"\nAt most it has {maximum}."
        )


def shortages_of(stage: str, requests: Sequence[ResourceRequest], node_types: Sequence[NodeType]) -> list[str]:
    """Return a line for each request that can never fit on `node_types`.

    When each request fits alone, return a line for each resource of which all of them together ask for too much.
    """
    lines = []
    for request in requests:
        num_that_fit = sum(
            _num_on_a_node(request.resources, node.resources) * node.max_count
            for node in node_types
            if _num_on_a_node(request.resources, node.resources)
        )
        if num_that_fit < request.count:
            lines.append(
                f"{stage} asks for {request}, the cluster's maximum is {_bound(num_that_fit)} of them: "
                f"lower {request.setting}, or add nodes"
            )
    if not lines:
        for name in sorted({name for request in requests for name in request.resources}):
            asked = math.fsum(request.count * request.resources.get(name, 0.0) for request in requests)
            maximum = math.fsum(
                node.max_count * node.resources[name] for node in node_types if node.resources.get(name)
            )
            if asked > maximum + 1e-9:
                parts = ", ".join(str(request) for request in requests if request.resources.get(name))
                lines.append(
                    f"{stage} asks for {asked:g} {name} at once, the cluster's maximum is {_bound(maximum)}: {parts}"
                )
    return lines


def find_node_types() -> list[NodeType] | None:
    """Return the nodes that the autoscaler may start or, without an autoscaler, the nodes that exist.

    Returns None when an autoscaler may run whose limits cannot be read from here.
    """
    if not is_on_head():
        return None
    alive = [
        NodeType(node["NodeName"], _resources_for_work(node["Resources"]), 1) for node in ray.nodes() if node["Alive"]
    ]
    path = autoscaler_config()
    if path is not None:
        return node_types_of(yaml.safe_load(path.read_text()), alive)
    if "KUBERNETES_SERVICE_HOST" in os.environ:
        config = kubernetes_config()
        return None if config is None else node_types_of(config, alive)
    return _usable(alive)


def node_types_of(config: Mapping[str, Any], alive: Sequence[NodeType]) -> list[NodeType] | None:
    """Return the nodes that the autoscaler of `config` may start.

    Where the nodes themselves say what they have (provider: local), return `alive` once all of them are there, and None
    before.
    """
    head, types = config.get("head_node_type"), config["available_node_types"]
    max_workers = float(config.get("max_workers", math.inf))
    if any(not settings.get("resources") for settings in types.values()):
        return _usable(alive) if len(alive) > max_workers else None
    return _usable(
        [
            NodeType(
                name,
                _resources_for_work(settings["resources"]),
                1 if name == head else min(max_workers, float(settings.get("max_workers", max_workers))),
            )
            for name, settings in types.items()
        ]
    )


def _usable(node_types: Sequence[NodeType]) -> list[NodeType]:
    return [node for node in node_types if node.resources and node.max_count]


def kubernetes_config() -> dict[str, Any] | None:
    """Return the config of KubeRay's autoscaler, derived as KubeRay does from the RayCluster that this pod belongs to.

    Returns None, and logs the reason, when that RayCluster cannot be read.
    """
    from ray.autoscaler._private.kuberay import autoscaling_config, node_provider

    try:
        api = node_provider.KubernetesHttpApiClient(namespace=POD_NAMESPACE.read_text().strip())
        cluster = api.get(f"rayclusters/{os.environ['RAY_CLUSTER_NAME']}")
    except (OSError, KeyError) as error:  # requests' errors are OSErrors
        logger.info("the RayCluster of this pod cannot be read: %r", error)
        return None
    config: dict[str, Any] = autoscaling_config._derive_autoscaling_config_from_ray_cr(cluster)
    return config


def wait_for_a_cpu(what: str, resources: Mapping[str, float]) -> None:
    """Wait until Ray has started a task that asks for a CPU and these resources; say now and then what is waited for.

    `what` needs them next. Ray Data 2.60 warns that a job "will hang" if no CPU is free when it begins, which is so for
    a moment after each stage, until its workers have ended. After this wait that warning is false, so it is turned off.
    """
    remote: Any = ray.remote(_do_nothing)
    task = remote.options(num_cpus=1, resources=dict(resources), name=f"a CPU for {what}").remote()
    begun_s = time.monotonic()
    while not ray.wait([task], timeout=WAITING_SAID_EVERY_S)[0]:
        logger.warning(
            "%s: waiting since %.0f s for a node with %s free; of the cluster's %s, %s is free",
            what,
            time.monotonic() - begun_s,
            _shown({"CPU": 1, **resources}),
            _shown(_resources_for_work(ray.cluster_resources())),
            _shown(_resources_for_work(ray.available_resources())),
        )
    ray.get(task)
    log_once("cpu_warning")  # Ray Data logs its warning where this key is new


def _do_nothing() -> None:
    pass


def autoscaler_config() -> Path | None:
    """Return the config file of the autoscaler that runs on this machine, or None when there is none.

    `ray up` starts the autoscaler beside the head, where the drivers of jobs run too.
    """
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            for argument in process.cmdline():
                if argument.startswith("--autoscaling-config=") and _monitors_this_cluster(process):
                    return Path(argument.partition("=")[2]).expanduser()
    return None


def _monitors_this_cluster(process: psutil.Process) -> bool:
    address = ray.get_runtime_context().gcs_address
    return any(argument == f"--gcs-address={address}" for argument in process.cmdline())


def _resources_for_work(resources: Mapping[str, float]) -> dict[str, float]:
    return {
        name: float(amount)
        for name, amount in resources.items()
        if name not in NOT_FOR_WORK and ":" not in name and amount
    }


def _num_on_a_node(wanted: Mapping[str, float], offered: Mapping[str, float]) -> float:
    """Return how many processes that each need `wanted` fit on one node that has `offered`."""
    return min(
        (math.floor(offered.get(name, 0.0) / amount + 1e-9) for name, amount in wanted.items()), default=math.inf
    )


def _bound(count: float) -> str:
    return "any number" if count == math.inf else f"{count:g}"


def _shown(resources: Mapping[str, float]) -> str:
    return "{" + ", ".join(f"{name}: {amount:g}" for name, amount in sorted(resources.items())) + "}"
