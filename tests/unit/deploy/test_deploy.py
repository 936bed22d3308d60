"""The files of deploy/*.yaml are correct, and the right check refuses a wrong name, port, field, secret or version.

Less security is refused, too.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jsonschema
import pytest
import yaml

from rm_robust.runs.directory import RUN_ROOT_VARIABLE
from serve.keys import KEYS_VARIABLE
from tests.support.deploy_manifests import (
    CHECKS,
    KEY_HASH,
    REPOSITORY,
    Fields,
    Manifests,
    check_config_fits,
    check_job,
    check_monitor,
    check_names,
    check_network,
    check_one_cluster,
    check_paths,
    check_prometheus,
    check_resources,
    check_schemas,
    check_security,
    check_service,
    check_versions,
    load_manifests,
)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
def test_the_manifests_hold(check: Callable[[Manifests], None]) -> None:
    check(load_manifests())


SHIPPED = ("rm_robust", "serve", "pipelines", "deploy", "docs/cluster", "README.md", "Makefile", "cluster.yaml")
TOKEN_OFF = re.compile(r"RAY_AUTH_MODE\W{1,6}(?:value\W{1,6})?disabled|authOptions\W+mode\W+disabled")


def test_no_shipped_file_turns_the_token_off() -> None:
    paths = [
        path
        for name in SHIPPED
        for path in ((REPOSITORY / name).rglob("*") if (REPOSITORY / name).is_dir() else [REPOSITORY / name])
    ]
    texts = {path: path.read_text() for path in paths if path.is_file() and "__pycache__" not in path.parts}
    assert (
        sum("RAY_AUTH_MODE" in text or "authOptions" in text for text in texts.values()) >= 5
    )  # three manifests and a script of deploy/, and cluster.yaml, at least
    assert [str(path) for path, text in texts.items() if TOKEN_OFF.search(text)] == []


@pytest.mark.parametrize(
    "line",
    [
        "RAY_AUTH_MODE=disabled",
        'os.environ["RAY_AUTH_MODE"] = "disabled"',
        "{name: RAY_AUTH_MODE, value: disabled}",
        "authOptions: {mode: disabled}",
    ],
)
def test_a_line_that_turns_the_token_off_is_seen(line: str) -> None:
    assert TOKEN_OFF.search(line)


# Each of the following changes to a correct set of files is refused by the check that is named.

REMOVED = object()


@dataclass(frozen=True)
class Renamed:
    """A change that gives the key at the end of the path another name."""

    name: str


@dataclass(frozen=True)
class Appended:
    """A change that adds an entry to the list at the end of the path."""

    entry: Fields


def step_into(value: Any, key: str) -> Any:
    """Do one step of a path: a key, an index, or the `name`, `groupName` or `job_name` of a list's entry."""
    if isinstance(value, dict):
        return value[key]
    if key.isdigit():
        return value[int(key)]
    return next(entry for entry in value if key in (entry.get("name"), entry.get("groupName"), entry.get("job_name")))


def mutate(root: Fields, path: str, value: object) -> None:
    *parents, key = path.split()
    for parent in parents:
        root = step_into(root, parent)
    if isinstance(root, list):
        assert value is REMOVED
        root.remove(step_into(root, key))
    elif value is REMOVED:
        del root[key]
    elif isinstance(value, Renamed):
        root[value.name] = root.pop(key)
    elif isinstance(value, Appended):
        root[key].append(value.entry)
    else:
        assert root.get(key) != value
        root[key] = value


def mutated(where: str, path: str, value: object) -> Manifests:
    """Return the manifests with one change.

    `where` is "ray" for the cluster in all three files, "serve" for the content of serveConfigV2, or one manifest.
    """
    manifests = load_manifests()
    if where == "ray":
        group = path.split()[1] if path.startswith("workerGroupSpecs") else None
        specs = [
            spec
            for spec in manifests.ray_specs()
            if group is None or group in [entry["groupName"] for entry in spec["workerGroupSpecs"]]
        ]
        assert specs
        for spec in specs:
            mutate(spec, path, value)
    elif where == "serve":
        config = manifests.serve_config()
        mutate(config, path, value)
        manifests.service["spec"]["serveConfigV2"] = yaml.safe_dump(config)
    elif where == "service":
        mutate(manifests.service, path, value)
    elif where == "job":
        mutate(manifests.job, path, value)
    elif where == "prometheus":
        mutate(manifests.prometheus, path, value)
    else:
        mutate(manifests.one(*where.split()), path, value)
    return manifests


HEAD = "headGroupSpec template spec"
HEAD_CONTAINER = f"{HEAD} containers ray-head"
TRAINER = "workerGroupSpecs trainer"
SERVING_CONTAINER = "workerGroupSpecs serving template spec containers ray-worker"
MODEL = "applications 0 args models 0"
MUTATIONS: list[tuple[str, str, object, Callable[[Manifests], None]]] = [
    # names and amounts of resources
    ("ray", f"{TRAINER} rayStartParams resources", '"{\\"trainr\\": 4}"', check_resources),
    ("ray", f"{TRAINER} rayStartParams resources", '"{\\"trainr\\": 4}"', check_config_fits),
    ("ray", f"{TRAINER} rayStartParams resources", '"{trainer: 4}"', check_resources),
    ("ray", f"{TRAINER} rayStartParams resources", REMOVED, check_config_fits),
    ("ray", f"{TRAINER} rayStartParams num-cpus", "6", check_config_fits),
    ("ray", "workerGroupSpecs data rayStartParams resources", '"{\\"dat\\": 16}"', check_config_fits),
    ("ray", f"{TRAINER} rayStartParams num-cpus", "49", check_resources),
    ("ray", f"{TRAINER} maxReplicas", 3, check_resources),
    ("ray", f"{TRAINER} idleTimeoutSeconds", REMOVED, check_resources),
    ("ray", f"{TRAINER} template spec nodeSelector node.kubernetes.io/instance-type", "g6e.xlarge", check_resources),
    ("ray", f"{TRAINER} template spec tolerations", REMOVED, check_resources),
    ("ray", "workerGroupSpecs rollout groupName", "rollouts", check_resources),
    ("ray", f"{SERVING_CONTAINER} resources limits nvidia.com/gpu", REMOVED, check_resources),
    ("ray", f"{SERVING_CONTAINER} resources requests memory", "1Gi", check_resources),
    ("ray", f"{SERVING_CONTAINER} resources limits cpu", "8", check_resources),
    ("ray", "headGroupSpec rayStartParams num-cpus", "4", check_resources),
    ("ray", "autoscalerOptions version", "v1", check_resources),
    ("ray", "enableInTreeAutoscaling", False, check_resources),
    ("serve", f"{MODEL} resources", {"servin": 1}, check_service),
    ("serve", f"{MODEL} max_replicas", 5, check_service),
    ("serve", f"{MODEL} num_gpus", 2, check_service),
    # fields
    ("ray", f"{TRAINER} maxReplicas", Renamed("maxReplica"), check_schemas),
    ("ray", f"{TRAINER} rayStartParams num-cpus", 48, check_schemas),
    ("ray", f"{TRAINER} template spec tolerations", Renamed("tolerates"), check_schemas),
    ("ray", f"{TRAINER} template spec restartPolicy", "Always", check_schemas),
    ("ray", f"{HEAD} securityContext", Renamed("securityContexts"), check_schemas),
    ("ray", f"{HEAD_CONTAINER} env HF_TOKEN valueFrom", Renamed("valuesFrom"), check_schemas),
    ("ray", "authOptions mode", "tokens", check_schemas),
    ("ray", "autoscalerOptions version", "v3", check_schemas),
    ("ray", "enableInTreeAutoscaling", Renamed("enableAutoscaling"), check_schemas),
    ("job", "apiVersion", "ray.io/v1alpha1", check_schemas),
    ("job", "metadata name", "full_rlhf", check_schemas),
    ("job", "spec entrypoint", Renamed("entryPoint"), check_schemas),
    ("job", "spec backoffLimit", "2", check_schemas),
    ("service", "spec rayClusterConfig", Renamed("rayClusterSpec"), check_schemas),
    ("NetworkPolicy ray-pods", "spec ingress", Renamed("ingresses"), check_schemas),
    ("PersistentVolumeClaim rm-robust-shared", "spec storageClassName", Renamed("storageClass"), check_schemas),
    ("serve", f"{MODEL} dtype", Renamed("datatype"), check_service),
    ("serve", f"{MODEL} device", "cpu", check_service),
    ("serve", "applications 0 route_prefix", Renamed("route"), check_service),
    ("serve", "applications 0 import_path", "serve.app:biuld", check_service),
    ("serve", "applications 0 deployments 0 name", "scorer_model", check_service),
    ("serve", "applications 0 args limits max_body_bytes", 1, check_service),
    # ports, and the pods that may reach them
    ("ray", f"{HEAD_CONTAINER} ports dashboard containerPort", 8266, check_network),
    ("ray", f"{HEAD_CONTAINER} ports dashboard name", "dash", check_network),
    ("ray", f"{HEAD_CONTAINER} ports", Appended({"name": "client", "containerPort": 10001}), check_network),
    ("ray", f"{HEAD_CONTAINER} ports gcs-server", REMOVED, check_network),
    ("serve", "http_options port", 8001, check_network),
    ("NetworkPolicy ray-pods", "spec ingress 1 from", [{"namespaceSelector": {}}], check_network),
    ("NetworkPolicy ray-pods", "spec ingress 1 ports", REMOVED, check_network),
    ("NetworkPolicy ray-pods", "spec ingress 0 from 0 podSelector", {}, check_network),
    ("NetworkPolicy ray-pods", "spec podSelector matchLabels", {"ray.io/is-ray-nod": "yes"}, check_network),
    ("NetworkPolicy scores", "spec ingress 0 ports 0 port", 8265, check_network),
    # the readers of metrics, and their ports
    ("PodMonitor ray-nodes", "spec podMetricsEndpoints 0 port", "metric", check_monitor),
    ("PodMonitor ray-nodes", "spec podMetricsEndpoints", Renamed("endpoints"), check_monitor),
    ("PodMonitor ray-nodes", "metadata namespace", "monitoring", check_names),
    ("NetworkPolicy ray-pods", "spec ingress 2 ports 0 port", 8081, check_network),
    ("PodMonitor ray-nodes", "spec selector matchLabels", {"ray.io/node-type": "worker"}, check_monitor),
    ("prometheus", "scrape_configs ray file_sd_configs 0 files", ["/tmp/ray/service_discovery.json"], check_prometheus),
    ("prometheus", "scrape_configs rm_robust_scoring static_configs 0 targets", ["127.0.0.1:8001"], check_prometheus),
    ("prometheus", "scrape_configs rm_robust_scoring authorization", REMOVED, check_prometheus),
    ("prometheus", "scrape_configs", Renamed("scrape_config"), check_prometheus),
    # secrets, volumes, paths
    ("ray", f"{HEAD_CONTAINER} env HF_TOKEN valueFrom secretKeyRef name", "rm-robust-hubs", check_names),
    ("ray", f"{HEAD_CONTAINER} env HF_TOKEN valueFrom secretKeyRef key", "tokens", check_names),
    (
        "service",
        f"spec rayClusterConfig {SERVING_CONTAINER} env {KEYS_VARIABLE} valueFrom secretKeyRef name",
        "api-keys",
        check_names,
    ),
    (
        "service",
        f"spec rayClusterConfig {SERVING_CONTAINER} env {KEYS_VARIABLE} name",
        "RM_ROBUST_API_KEY",
        check_service,
    ),
    ("ray", f"{HEAD} volumes shared persistentVolumeClaim claimName", "shared", check_names),
    ("ray", f"{HEAD_CONTAINER} volumeMounts shared name", "share", check_names),
    ("PersistentVolumeClaim rm-robust-shared", "metadata name", "rm-robust-runs", check_names),
    ("PersistentVolumeClaim rm-robust-shared", "spec accessModes", ["ReadWriteOnce"], check_names),
    ("job", "metadata namespace", "default", check_names),
    ("ray", f"{HEAD_CONTAINER} volumeMounts shared mountPath", "/mnt", check_paths),
    ("ray", f"{HEAD_CONTAINER} env {RUN_ROOT_VARIABLE} value", "/tmp/runs", check_paths),
    ("ray", f"{HEAD_CONTAINER} env {RUN_ROOT_VARIABLE}", REMOVED, check_paths),
    ("serve", f"{MODEL} checkpoint_dir", "/models/reward_model", check_paths),
    ("job", "spec entrypoint", "python pipelines/full_rlfh.py --config pipelines/configs/full_rlhf.toml", check_job),
    ("job", "spec entrypoint", "python pipelines/full_rlhf.py --config pipelines/configs/full.toml", check_job),
    ("job", "spec submissionMode", "K8sJobMode", check_job),
    ("job", "spec shutdownAfterJobFinishes", False, check_job),
    ("ray", f"{HEAD_CONTAINER} env RAY_JOB_STOP_WAIT_TIME_S", REMOVED, check_job),
    ("ray", f"{HEAD_CONTAINER} env RAY_JOB_STOP_WAIT_TIME_S value", "3", check_job),
    # versions
    ("ray", "rayVersion", "2.59.0", check_versions),
    ("ray", f"{HEAD_CONTAINER} image", "REGISTRY/rm-robust:latest", check_versions),
    # authentication, and what a pod may do
    ("ray", "authOptions mode", "disabled", check_security),
    ("ray", "authOptions", REMOVED, check_security),
    ("ray", f"{HEAD_CONTAINER} env", Appended({"name": "RAY_AUTH_MODE", "value": "disabled"}), check_security),
    ("serve", "applications 0 args", {"insecure_no_auth": True}, check_service),
    ("serve", "applications 0 args api_keys", [{"name": "alice", "sha256": KEY_HASH}], check_service),
    ("ray", "headGroupSpec serviceType", "LoadBalancer", check_security),
    ("ray", "headGroupSpec enableIngress", True, check_security),
    ("ray", "headGroupSpec rayStartParams dashboard-host", "0.0.0.0", check_security),
    ("ray", f"{HEAD} hostNetwork", True, check_security),
    ("ray", f"{HEAD} securityContext runAsUser", 0, check_security),
    ("ray", f"{HEAD} securityContext runAsNonRoot", False, check_security),
    ("ray", f"{HEAD_CONTAINER} securityContext allowPrivilegeEscalation", True, check_security),
    ("ray", "autoscalerOptions securityContext", REMOVED, check_security),
    ("ray", f"{TRAINER} template spec automountServiceAccountToken", True, check_security),
    # one file that differs from the others
    ("job", f"spec rayClusterSpec {TRAINER} maxReplicas", 4, check_one_cluster),
    ("service", f"spec rayClusterConfig {SERVING_CONTAINER} resources limits memory", "1Gi", check_one_cluster),
    ("service", f"spec rayClusterConfig {HEAD} restartPolicy", "OnFailure", check_one_cluster),
]


@pytest.mark.parametrize(
    ("where", "path", "value", "check"),
    MUTATIONS,
    ids=lambda part: part.__name__.removeprefix("check_") if callable(part) else None,
)
def test_a_broken_manifest_is_refused(where: str, path: str, value: object, check: Callable[[Manifests], None]) -> None:
    manifests = mutated(where, path, value)
    with pytest.raises((AssertionError, KeyError, ValueError, StopIteration, jsonschema.ValidationError)):
        check(manifests)


def test_a_secret_that_nobody_is_told_to_make_is_refused() -> None:
    manifests = load_manifests()
    manifests.created_secrets.remove(("rm-robust-api-keys", "keys.toml"))
    with pytest.raises(AssertionError):
        check_names(manifests)
