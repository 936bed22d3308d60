"""Check deploy/*.yaml: Kubernetes, KubeRay, Ray and Serve accept the files, and their names and resources fit together.

The resources must be those that cluster.yaml and the configs name. tests/unit/deploy/test_deploy.py calls the checks on
the files as they are and on broken ones. The checks work offline: they use the schemas of Kubernetes and KubeRay
(tests/fixtures/), the autoscaling config that Ray's own code derives from a RayCluster, Serve's schema and this
project's settings. A check raises AssertionError, or whatever that code raises.
"""

import copy
import functools
import json
import re
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from fastapi.routing import APIRoute
from ray._private.ray_constants import PROMETHEUS_SERVICE_DISCOVERY_FILE, SESSION_LATEST
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.serve.schema import ServeDeploySchema

from rm_robust.config.loading import load_config
from rm_robust.config.run import PipelineConfig
from rm_robust.runs.directory import RUN_ROOT_VARIABLE
from serve.app import build, scorer_name
from serve.http.middleware import OPEN_PATHS
from serve.http.routes import router
from serve.keys import KEYS_VARIABLE
from serve.settings import ModelSettings

REPOSITORY = Path(__file__).parents[2]
DEPLOY = REPOSITORY / "deploy"
FIXTURES = REPOSITORY / "tests" / "fixtures"
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
KEY_HASH = "0" * 64

KUBERNETES_KINDS = {"Namespace": "core.v1", "PersistentVolumeClaim": "core.v1", "NetworkPolicy": "networking.v1"}
RAY_FILES = ("ray_cluster.yaml", "ray_job.yaml", "ray_service.yaml")
OPEN_PORTS = {"gcs-server": 6379, "dashboard": 8265, "metrics": 8080, "serve": 8000}
"""The head's ports by the names under which KubeRay looks for them.

Port 10001 (Ray Client) is missing, because nothing here uses it. Newer KubeRay adds it to the head's Service by itself.
"""
OPERATOR_PORTS = {8265, 8000}
SERVICE_DIFFERS_IN = {
    "proxy_location",
    "http_options.host",
    "applications.0.args.api_keys.0.name",
    "applications.0.args.api_keys.0.sha256",
    "applications.0.args.models.0.checkpoint_dir",
    "applications.0.args.models.0.device",
    "applications.0.args.models.0.num_gpus",
    "applications.0.args.models.0.num_cpus",
    "applications.0.args.models.0.num_threads",
    "applications.0.args.models.0.resources.serving",
    "applications.0.args.models.0.dtype",
    "applications.0.args.models.0.max_length_tokens",
    "applications.0.args.models.0.max_batch_tokens",
    "applications.0.deployments.0.user_config.checkpoint_dir",
}
"""The fields in which the RayService's application differs from serve/reward_model.yaml. All other fields are equal."""

Fields = dict[str, Any]
"""A YAML mapping."""


@dataclass
class Manifests:
    """The parsed files, which mutations change."""

    kubernetes: list[Fields]
    cluster: Fields
    job: Fields
    service: Fields
    monitor: Fields
    """The content of pod_monitor.yaml."""
    prometheus: Fields
    """The content of prometheus.yaml, which is no manifest."""
    created_secrets: set[tuple[str, str]]
    """The names and keys of the `kubectl create secret` commands at the head of kubernetes.yaml."""

    def of_ray(self) -> list[Fields]:
        return [self.cluster, self.job, self.service]

    def ray_specs(self) -> list[Fields]:
        return [self.cluster["spec"], self.job["spec"]["rayClusterSpec"], self.service["spec"]["rayClusterConfig"]]

    def one(self, kind: str, name: str) -> Fields:
        (match,) = [
            manifest
            for manifest in (*self.kubernetes, self.monitor)
            if (manifest["kind"], manifest["metadata"]["name"]) == (kind, name)
        ]
        return match

    def serve_config(self) -> Fields:
        config: Fields = yaml.safe_load(self.service["spec"]["serveConfigV2"])
        return config


def load_manifests() -> Manifests:
    """Return new objects for mutations to change.

    They hold no YAML aliases: an alias would be one object in several places, and change in all of them.
    """
    kubernetes, monitor, prometheus, cluster, job, service = json.loads(parsed_files())
    text = (DEPLOY / "kubernetes.yaml").read_text()
    secrets = re.findall(
        r"^#   kubectl -n \S+ create secret generic (\S+) --from-(?:file|literal)=([\w.]+)=", text, re.MULTILINE
    )
    return Manifests(kubernetes, cluster, job, service, monitor, prometheus, set(secrets))


@functools.cache
def parsed_files() -> str:
    """Return the parsed files as JSON. They are parsed once, because PyYAML takes longer than the checks."""
    kubernetes = list(yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text()))
    return json.dumps(
        [
            kubernetes,
            *(
                yaml.safe_load((DEPLOY / name).read_text())
                for name in ("pod_monitor.yaml", "prometheus.yaml", *RAY_FILES)
            ),
        ]
    )


def pod_specs(ray_spec: Fields) -> list[Fields]:
    return [group["template"]["spec"] for group in (ray_spec["headGroupSpec"], *ray_spec["workerGroupSpecs"])]


def container_of(pod_spec: Fields) -> Fields:
    (container,) = pod_spec["containers"]
    return dict(container)


def image_user() -> int:
    """Return the user id with which deploy/Dockerfile.gpu ends. The manifests name its image."""
    (user,) = re.findall(r"^USER (\d+):\d+$", (DEPLOY / "Dockerfile.gpu").read_text(), re.MULTILINE)
    return int(user)


def environment(container: Fields) -> dict[str, Fields]:
    return {entry["name"]: entry for entry in container["env"]}


def leaves(value: object, path: str = "") -> Iterator[tuple[str, object]]:
    """Yield the dotted path and the value of everything that is neither a mapping nor a list."""
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if parts is None:
        yield path, value
        return
    for name, part in parts:
        yield from leaves(part, f"{path}.{name}" if path else str(name))


# These checks look at each manifest by itself.


def check_schemas(manifests: Manifests) -> None:
    kubernetes = json.loads((FIXTURES / "kubernetes_schema.json").read_text())["$defs"]
    definitions = {**kubernetes, **json.loads((FIXTURES / "kuberay_schema.json").read_text())["$defs"]}

    def hold(manifest: Fields, definition: str) -> None:
        jsonschema.Draft202012Validator({"$ref": f"#/$defs/{definition}", "$defs": definitions}).validate(manifest)

    for manifest in manifests.kubernetes:
        hold(manifest, f"io.k8s.api.{KUBERNETES_KINDS[manifest['kind']]}.{manifest['kind']}")
    for manifest, kind in zip(manifests.of_ray(), ("RayCluster", "RayJob", "RayService"), strict=True):
        assert manifest["kind"] == kind
        hold(manifest, kind)


def autoscaling_config(ray_spec: Fields) -> Fields:
    """Return the config that Ray's autoscaler reads from the cluster's custom resource. Raises what it would raise."""
    config: Fields = _derive_autoscaling_config_from_ray_cr(
        {"metadata": {"name": "c", "namespace": "n"}, "spec": ray_spec}
    )
    validate_config(prepare_config(copy.deepcopy(config)))
    return config


@functools.cache
def parsed_cluster_yaml() -> Fields:
    config: Fields = yaml.safe_load((REPOSITORY / "cluster.yaml").read_text())
    return config


def check_resources(manifests: Manifests) -> None:
    """Check that the groups are cluster.yaml's kinds of node with the same names, as Ray itself reads them.

    A pod leaves some of its machine to Kubernetes.
    """
    cluster_yaml = parsed_cluster_yaml()
    kinds = cluster_yaml["available_node_types"]
    for ray_spec in manifests.ray_specs():
        assert ray_spec["enableInTreeAutoscaling"] is True
        assert ray_spec["autoscalerOptions"]["version"] == "v2"
        types = autoscaling_config(ray_spec)["available_node_types"]
        head = types.pop("headgroup")
        assert head["resources"]["CPU"] == kinds["head"]["resources"]["CPU"] == 0
        assert types.keys() <= kinds.keys()
        for name, node_type in types.items():
            resources = {key: amount for key, amount in node_type["resources"].items() if key != "memory"}
            assert resources == kinds[name]["resources"], name
            for field in ("min_workers", "max_workers", "idle_timeout_s"):
                assert node_type[field] == kinds[name][field], (name, field)
        for group in ray_spec["workerGroupSpecs"]:
            pod = group["template"]["spec"]
            resources = container_of(pod)["resources"]
            assert resources["requests"] == resources["limits"], group["groupName"]
            assert 0 < int(resources["limits"]["cpu"]) < int(group["rayStartParams"]["num-cpus"])
            assert pod["nodeSelector"] == {
                "node.kubernetes.io/instance-type": kinds[group["groupName"]]["node_config"]["InstanceType"]
            }
            assert ("nvidia.com/gpu" in resources["limits"]) == any(
                entry["key"] == "nvidia.com/gpu" for entry in pod.get("tolerations", [])
            )
    assert {group["groupName"] for group in manifests.cluster["spec"]["workerGroupSpecs"]} == kinds.keys() - {
        cluster_yaml["head_node_type"]
    }


def check_one_cluster(manifests: Manifests) -> None:
    """Check that the job's cluster equals the cluster, and the service's groups equal its groups with the same names.

    The groups of a service may differ in their environment and in the port of Serve.
    """
    cluster, job, service = manifests.ray_specs()
    assert job == cluster
    groups = {group["groupName"]: group for group in cluster["workerGroupSpecs"]}
    for group in service["workerGroupSpecs"]:
        assert without(group, "env", "ports") == without(groups[group["groupName"]], "env", "ports")
    assert without(service["headGroupSpec"], "env", "ports") == without(cluster["headGroupSpec"], "env", "ports")
    assert service["autoscalerOptions"] == cluster["autoscalerOptions"]


def without(group: Fields, *names: str) -> Fields:
    group = copy.deepcopy(group)
    for container in group["template"]["spec"]["containers"]:
        for name in names:
            container.pop(name, None)
    return group


def check_versions(manifests: Manifests) -> None:
    (version,) = [
        entry.split("==")[1] for entry in PROJECT["optional-dependencies"]["pipeline"] if entry.startswith("ray[")
    ]
    for ray_spec in manifests.ray_specs():
        assert ray_spec["rayVersion"] == version
        for pod in pod_specs(ray_spec):
            assert container_of(pod)["image"] == f"REGISTRY/rm-robust:{PROJECT['version']}-gpu"


# These checks look at permissions.


def check_security(manifests: Manifests) -> None:
    for ray_spec in manifests.ray_specs():
        assert ray_spec["authOptions"] == {"mode": "token"}
        head = ray_spec["headGroupSpec"]
        assert head["serviceType"] == "ClusterIP"
        assert "enableIngress" not in head
        assert ray_spec["autoscalerOptions"]["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
        }
        for pod in pod_specs(ray_spec):
            assert pod["securityContext"]["runAsNonRoot"] is True
            assert pod["securityContext"]["runAsUser"] == image_user()
            assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
            assert not {"hostNetwork", "hostPID", "hostIPC"} & pod.keys()
            container = container_of(pod)
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "capabilities": {"drop": ["ALL"]},
            }
            assert not {"RAY_AUTH_MODE", "RAY_AUTH_TOKEN"} & environment(container).keys(), (
                "authOptions sets them, and leaves what is set alone"
            )
            assert not any("hostPort" in port for port in container.get("ports", []))
        for group in ray_spec["workerGroupSpecs"]:
            assert group["template"]["spec"]["automountServiceAccountToken"] is False
    open_hosts = [
        path for manifest in manifests.of_ray() for path, value in leaves(manifest) if "0.0.0.0" in str(value)
    ]
    assert open_hosts == ["spec.serveConfigV2"]
    assert [path for path, value in leaves(manifests.serve_config()) if value == "0.0.0.0"] == ["http_options.host"]


def check_network(manifests: Manifests) -> None:
    """Check that only Ray's pods reach all ports of Ray's pods.

    Every other rule names its ports, and containers declare these ports.
    """
    policies = [manifest for manifest in manifests.kubernetes if manifest["kind"] == "NetworkPolicy"]
    assert {policy["metadata"]["name"] for policy in policies} == {"ray-pods", "scores"}
    ray_pods = {"matchLabels": {"ray.io/is-ray-node": "yes"}}  # KubeRay gives this label to every pod
    assert manifests.one("NetworkPolicy", "ray-pods")["spec"]["podSelector"] == ray_pods
    assert manifests.one("NetworkPolicy", "scores")["spec"]["podSelector"] == {"matchLabels": {"ray.io/serve": "true"}}
    reached: dict[str, set[int]] = {}
    for policy in policies:
        assert policy["spec"]["policyTypes"] == ["Ingress"]
        for rule in policy["spec"]["ingress"]:
            (peer,) = rule["from"]
            if peer == {"podSelector": ray_pods}:
                continue
            labels = peer.get("podSelector", peer["namespaceSelector"])["matchLabels"]
            (label,) = labels
            reached[label] = {entry["port"] for entry in rule["ports"]}
    assert reached == {
        "app.kubernetes.io/name": OPERATOR_PORTS,
        "rm-robust/reads-metrics": {OPEN_PORTS["metrics"]},
        "rm-robust/asks-for-scores": {manifests.serve_config()["http_options"]["port"]},
    }
    for manifest, ray_spec in zip(manifests.of_ray(), manifests.ray_specs(), strict=True):
        head = {
            port["name"]: port["containerPort"]
            for port in container_of(ray_spec["headGroupSpec"]["template"]["spec"])["ports"]
        }
        serves = manifest["kind"] == "RayService"
        assert head == {name: number for name, number in OPEN_PORTS.items() if serves or name != "serve"}
        for group in ray_spec["workerGroupSpecs"]:
            ports = {
                port["name"]: port["containerPort"] for port in container_of(group["template"]["spec"]).get("ports", [])
            }
            assert ports == ({"serve": OPEN_PORTS["serve"]} if serves else {})
    assert manifests.serve_config()["http_options"]["port"] == OPEN_PORTS["serve"]


METRICS_PATH = "/metrics"


def check_monitor(manifests: Manifests) -> None:
    """Check that the monitor reads all of Ray's pods, at the named port whose number check_network checks."""
    monitor = manifests.monitor
    assert (monitor["apiVersion"], monitor["kind"]) == ("monitoring.coreos.com/v1", "PodMonitor")
    ray_pods = manifests.one("NetworkPolicy", "ray-pods")["spec"]["podSelector"]
    assert monitor["spec"] == {"selector": ray_pods, "podMetricsEndpoints": [{"port": "metrics"}]}


def check_prometheus(manifests: Manifests) -> None:
    """Check that Prometheus reads Ray's own list of its nodes, and the scoring service with a key.

    The service must be where serve/reward_model.yaml and `make serve` put it.
    """
    config = manifests.prometheus
    assert config.keys() == {"global", "scrape_configs"}
    nodes, scores = config["scrape_configs"]
    assert nodes == {
        "job_name": "ray",
        "file_sd_configs": [{"files": [f"/tmp/ray/{SESSION_LATEST}/{PROMETHEUS_SERVICE_DISCOVERY_FILE}"]}],
    }
    # Without metrics_path, Prometheus asks for METRICS_PATH.
    assert scores.keys() == {"job_name", "authorization", "static_configs"}
    assert METRICS_PATH not in OPEN_PATHS
    assert scores["authorization"].keys() == {"credentials_file"}, (
        "the type is Bearer by default, and no file here holds the key itself"
    )
    assert METRICS_PATH in {route.path for route in router.routes if isinstance(route, APIRoute)}
    options = yaml.safe_load((REPOSITORY / "serve" / "reward_model.yaml").read_text())["http_options"]
    assert scores["static_configs"] == [{"targets": [f"{options['host']}:{options['port']}"]}]
    (port,) = re.findall(r"^PORT \?= (\d+)$", (REPOSITORY / "Makefile").read_text(), re.MULTILINE)
    assert int(port) == options["port"] == OPEN_PORTS["serve"]
    starts = [
        command
        for key in ("head_start_ray_commands", "worker_start_ray_commands")
        for command in parsed_cluster_yaml()[key]
    ]
    exported = [re.findall(r"--metrics-export-port=(\d+)", command) for command in starts if "ray start" in command]
    assert exported == [[str(OPEN_PORTS["metrics"])]] * 2


# These checks look at names: what is named must exist.


def check_names(manifests: Manifests) -> None:
    namespace = manifests.one("Namespace", "rm-robust")["metadata"]["name"]
    others = [manifest for manifest in manifests.kubernetes if manifest["kind"] != "Namespace"]
    assert {manifest["metadata"]["namespace"] for manifest in (*others, manifests.monitor, *manifests.of_ray())} == {
        namespace
    }
    claims = {
        manifest["metadata"]["name"] for manifest in manifests.kubernetes if manifest["kind"] == "PersistentVolumeClaim"
    }
    assert manifests.one("PersistentVolumeClaim", "rm-robust-shared")["spec"]["accessModes"] == ["ReadWriteMany"]
    used_secrets: set[tuple[str, str]] = set()
    for ray_spec in manifests.ray_specs():
        for pod in pod_specs(ray_spec):
            assert {volume["persistentVolumeClaim"]["claimName"] for volume in pod["volumes"]} <= claims
            container = container_of(pod)
            assert {mount["name"] for mount in container["volumeMounts"]} == {
                volume["name"] for volume in pod["volumes"]
            }
            references = [entry["valueFrom"]["secretKeyRef"] for entry in container["env"] if "valueFrom" in entry]
            used_secrets |= {(reference["name"], reference["key"]) for reference in references}
    assert used_secrets == manifests.created_secrets


def check_paths(manifests: Manifests) -> None:
    """Check that all paths of the job's config lie on the shared volume, and the service serves what the job trains."""
    config = load_config(REPOSITORY / config_of_the_job(manifests), [])
    for ray_spec in manifests.ray_specs():
        for pod in pod_specs(ray_spec):
            container = container_of(pod)
            (mount,) = container["volumeMounts"]
            shared = f"{mount['mountPath']}/"
            variables = environment(container)
            assert variables[RUN_ROOT_VARIABLE]["value"].startswith(shared)
            assert variables["HF_HOME"]["value"].startswith(shared)
            absolute = [str(value) for _, value in leaves(config.model_dump(mode="json")) if str(value).startswith("/")]
            assert absolute
            assert [path for path in absolute if not path.startswith(shared)] == []
    root = environment(container_of(pod_specs(manifests.ray_specs()[2])[0]))[RUN_ROOT_VARIABLE]["value"]
    trained = f"{root}/{config.name}/checkpoints/reward_model"
    assert {value for path, value in leaves(manifests.serve_config()) if path.endswith("checkpoint_dir")} == {trained}


def config_of_the_job(manifests: Manifests) -> str:
    python, script, option, config = manifests.job["spec"]["entrypoint"].split()
    assert (python, option) == ("python", "--config")
    assert (REPOSITORY / script).is_file()
    return str(config)


def check_job(manifests: Manifests) -> None:
    spec = manifests.job["spec"]
    assert (REPOSITORY / config_of_the_job(manifests)).is_file()
    assert spec["submissionMode"] == "HTTPMode"  # a submitter pod would need a rule in the network policy
    assert spec["shutdownAfterJobFinishes"] is True
    for ray_spec in manifests.ray_specs():
        variables = environment(container_of(ray_spec["headGroupSpec"]["template"]["spec"]))
        # Ray's supervisor of a job runs on the head, and reads the variable there.
        assert int(variables["RAY_JOB_STOP_WAIT_TIME_S"]["value"]) == 60
    assert 1 <= spec["backoffLimit"] <= 5


def check_service(manifests: Manifests) -> None:
    """Check the service's application.

    Serve's schema and this project's settings accept it. It equals serve/reward_model.yaml except for
    SERVICE_DIFFERS_IN, and it fits its nodes.
    """
    config = manifests.serve_config()
    deployed = ServeDeploySchema.model_validate(config)
    (application,) = deployed.applications
    assert application.import_path == "serve.app:build"
    assert "api_keys" not in application.args
    for pod in pod_specs(manifests.ray_specs()[2]):
        assert "secretKeyRef" in environment(container_of(pod))[KEYS_VARIABLE]["valueFrom"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(KEYS_VARIABLE, f'alice = {{ sha256 = "{KEY_HASH}" }}')
        build(application.args)
    original = dict(leaves(yaml.safe_load((REPOSITORY / "serve" / "reward_model.yaml").read_text())))
    ours = dict(leaves(config))
    assert {
        path for path in original.keys() | ours.keys() if original.get(path) != ours.get(path)
    } == SERVICE_DIFFERS_IN
    (model,) = (ModelSettings.model_validate(fields) for fields in application.args["models"])
    (scorer,) = application.deployments
    assert scorer.name == scorer_name(model)
    (group,) = (
        kind
        for name, kind in autoscaling_config(manifests.ray_specs()[2])["available_node_types"].items()
        if name != "headgroup"
    )
    requested = {"CPU": model.num_cpus, "GPU": model.num_gpus, **model.resources}
    assert {name for name, amount in requested.items() if group["resources"].get(name, 0) < amount} == set()
    assert model.max_replicas is not None
    assert model.max_replicas <= group["max_workers"]
    proxy = load_config(REPOSITORY / config_of_the_job(manifests), []).serve.proxy_replica
    as_in_training = {
        "num_threads",
        "num_cpus",
        "num_gpus",
        "resources",
        "dtype",
        "max_length_tokens",
        "max_batch_tokens",
    }
    assert model.model_dump(include=as_in_training) == proxy.model_dump(include=as_in_training)


def requests_by_custom_resource(config: PipelineConfig) -> dict[str, list[Fields]]:
    """Return all resources that single processes of the config ask for, by the name of their custom resource."""
    workers = [config.sft.workers, config.reward_model.workers, config.rloo.trainers]
    requests = [{"CPU": w.num_cpus_per_worker, "GPU": w.num_gpus_per_worker, **w.resources_per_worker} for w in workers]
    replicas = [config.evaluation, config.serve.proxy_replica, config.serve.gold_replica]
    requests += [{"CPU": r.num_cpus, "GPU": r.num_gpus, **r.resources} for r in replicas]
    requests.append(
        {"CPU": config.rloo.engine_num_cpus, "GPU": config.rloo.engine_num_gpus, **config.rloo.engine_resources}
    )
    requests.append({"CPU": 1, **config.data.task_resources})
    by_name: dict[str, list[Fields]] = {}
    for amounts in requests:
        (name,) = amounts.keys() - {"CPU", "GPU"}
        by_name.setdefault(name, []).append(amounts)
    return by_name


def check_config_fits(manifests: Manifests) -> None:
    types = autoscaling_config(manifests.job["spec"]["rayClusterSpec"])["available_node_types"]
    requests = requests_by_custom_resource(load_config(REPOSITORY / config_of_the_job(manifests), []))
    assert requests.keys() == {name for kind in types.values() for name in kind["resources"]} - {"CPU", "GPU", "memory"}
    for name, processes in requests.items():
        for amounts in processes:
            assert all(types[name]["resources"].get(key, 0) >= amount for key, amount in amounts.items()), (
                name,
                amounts,
            )


CHECKS = (
    check_schemas,
    check_resources,
    check_one_cluster,
    check_versions,
    check_security,
    check_network,
    check_monitor,
    check_prometheus,
    check_names,
    check_paths,
    check_job,
    check_service,
    check_config_fits,
)
