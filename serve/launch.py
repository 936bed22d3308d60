"""Starts Serve and deploys models on it, waiting until they answer.

Three ways in. `deploy_service` is a whole service below a route prefix of Serve's own proxy, which clusters use. `deploy_inside` is one without HTTP, for
a pipeline's own processes. `deploy_models` is the replicas alone, for `python -m serve`, whose front has an HTTP server of its own: Serve's Python proxy
costs 11 ms of CPU per request, and its HAProxy (`RAY_SERVE_ENABLE_HA_PROXY=1`) binds 0.0.0.0 on the replicas' own HTTP ports and the fixed ports 9101 and
8404, whatever host is given, and shows every client as one of this machine. On a cluster whose ports are closed to others it is the faster ingress, and
the same application runs behind it.

On loopback, unless there are keys: Ray's own token does not guard Serve's port.
"""

import logging
import socket
import time

import httpx
import ray
from ray import serve
from ray.serve.config import HTTPOptions, ProxyLocation
from ray.serve.context import _get_global_client  # the one way to ask a running Serve for its host and port
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import ApplicationStatus

from rm_robust.cluster.environment import free_port
from rm_robust.errors import ConfigError
from rm_robust.models.checkpoint import verify_checkpoint
from serve.app import QUIET, refuse_no_keys, scorer_app, service_app
from serve.settings import ModelSettings, ServiceSettings

logger = logging.getLogger(__name__)
LOOPBACK_HOSTS = ("127.0.0.1", "localhost")
POLL_EVERY_S = 0.2


def start_serve(host: str, port: int) -> str:
    """Start Serve on this Ray cluster, or find it running; returns the "http://host:port" it listens on. Port 0 takes a free one.

    Raises ConfigError for a port that is taken. A Serve that already runs keeps its own host and port.
    """
    logging.getLogger("ray.serve").setLevel(logging.WARNING)  # a line or two per call otherwise
    running = running_http_options()
    if running is None:
        port = port or free_port(host)
        refuse_taken_port(host, port)
        serve.start(proxy_location="HeadOnly", http_options=HTTPOptions(host=host, port=port), logging_config=QUIET)
        return f"http://{host}:{port}"
    if port not in (0, running.port):
        logger.info("Serve already runs on port %d of this Ray cluster; port %d is not used", running.port, port)
    return f"http://{running.host}:{running.port}"


def start_serve_without_http() -> None:
    """For a front that has an HTTP server of its own, and for a run's scorers, which nobody else asks. A Serve that already runs stays as it is."""
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    serve.start(proxy_location=ProxyLocation.Disabled, logging_config=QUIET)


def deploy_inside(settings: ServiceSettings, app_name: str, *, deadline_s: float) -> None:
    """Deploy (or replace) one service for this cluster alone, whose processes reach it through ClusterScorer; returns once every replica is up.

    Raises as deploy_service.
    """
    serve.run_many(
        [serve.RunTarget(service_app(with_verified_checkpoints(settings)), name=app_name, route_prefix=None)],
        wait_for_applications_running=False,
    )
    wait_until_up([app_name], deadline_s=deadline_s)


def deploy_service(settings: ServiceSettings, app_name: str, route_prefix: str, *, deadline_s: float = 180.0) -> str:
    """Deploy (or replace) one service after start_serve; returns its base URL once `/healthz` answers and every replica is up.

    Raises CheckpointError before anything is deployed when a directory is no intact reward model, ConfigError for a service without keys on
    an open host, and with Serve's reasons when the deployment fails or is not up after `deadline_s` (it is left as it is, to be looked at or
    deleted).
    """
    settings = with_verified_checkpoints(settings)
    running = running_http_options()
    assert running is not None, "start_serve comes before deploy_service"
    refuse_open_host(running.host or "", settings)
    base_url = f"http://{running.host}:{running.port}{route_prefix.rstrip('/')}"
    started_s = time.monotonic()
    serve.run_many(
        [serve.RunTarget(service_app(settings), name=app_name, route_prefix=route_prefix)],
        wait_for_applications_running=False,
    )
    wait_until_up([app_name], deadline_s=deadline_s, base_url=base_url)
    names = ", ".join(model.model_name for model in settings.models)
    logger.info("service %s serves %s at %s after %.1f s", app_name, names, base_url, time.monotonic() - started_s)
    return base_url


def deploy_models(settings: ServiceSettings, *, deadline_s: float = 180.0) -> "dict[str, DeploymentHandle[object]]":
    """Deploy the replicas of every model, each an application of its own without HTTP; returns their handles once all are up.

    Called again, it swaps what has changed; a change of checkpoint alone is a swap in place. Raises as deploy_service.
    """
    refuse_no_keys(settings)
    settings = with_verified_checkpoints(settings)
    targets = [
        serve.RunTarget(scorer_app(model, settings), name=model.model_name, route_prefix=None)
        for model in settings.models
    ]
    serve.run_many(targets, wait_for_applications_running=False)
    wait_until_up([model.model_name for model in settings.models], deadline_s=deadline_s)
    return {model.model_name: serve.get_app_handle(model.model_name) for model in settings.models}


def delete_service(app_name: str) -> None:
    """Take one service down, after the requests it is working on. Others stay."""
    serve.delete(app_name)


def with_verified_checkpoints(settings: ServiceSettings) -> ServiceSettings:
    """With absolute paths. The replicas verify too; here an error keeps its class and costs no deployment."""

    def verified(model: ModelSettings) -> ModelSettings:
        if model.checkpoint_dir is None:
            return model
        checkpoint_dir = model.checkpoint_dir.resolve()
        verify_checkpoint(checkpoint_dir, "reward_model")
        return model.model_copy(update={"checkpoint_dir": checkpoint_dir})

    return settings.model_copy(update={"models": tuple(verified(model) for model in settings.models)})


def wait_until_up(app_names: list[str], *, deadline_s: float, base_url: str | None = None) -> None:
    """Until every replica is up and, with a URL, the proxy routes to them. Raises ConfigError with Serve's reasons."""
    started_s = time.monotonic()
    while not all(is_up(app_name, base_url) for app_name in app_names):
        if time.monotonic() - started_s > deadline_s:
            late = next(app_name for app_name in app_names if not is_up(app_name, base_url))
            raise ConfigError(f"The service {late!r} is not up after {deadline_s:.0f} s: {why_not_up(late)}")
        time.sleep(POLL_EVERY_S)


def is_up(app_name: str, base_url: str | None) -> bool:
    """Raises ConfigError when the deployment has failed for good."""
    status = serve.status().applications[app_name].status
    if status == ApplicationStatus.DEPLOY_FAILED:
        raise ConfigError(f"The service {app_name!r} could not be started: {why_not_up(app_name)}")
    if status != ApplicationStatus.RUNNING:
        return False
    if base_url is None:
        return True
    try:
        return httpx.get(f"{base_url}/healthz", timeout=5, trust_env=False).status_code == 200
    except httpx.TransportError:
        return False


def why_not_up(app_name: str) -> str:
    """What Serve says of the application and its deployments, and what the cluster has."""
    application = serve.status().applications[app_name]
    said = [f"{name} {d.status.value}: {d.message}" for name, d in application.deployments.items() if d.message]
    return "; ".join(
        [application.message or application.status.value, *said, f"the cluster has {ray.cluster_resources()}"]
    )


def running_http_options() -> HTTPOptions | None:
    """Of the Serve instance on this Ray cluster, if there is one."""
    client = _get_global_client(raise_if_no_controller_running=False)
    return None if client is None else client.http_config


def refuse_open_host(host: str, settings: ServiceSettings) -> None:
    """Raise ConfigError for a service without keys on a host that others can reach."""
    if host not in LOOPBACK_HOSTS and not settings.api_keys:
        raise ConfigError(
            f"A service without keys listens on loopback only: host is {host!r}, use '127.0.0.1', or give it keys."
        )


def refuse_taken_port(host: str, port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as Serve binds: a port in TIME_WAIT is free
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ConfigError(
                f"Port {port} on {host} cannot be used ({error.strerror}). Choose another, or 0 for a free one."
            ) from error
