"""Start Serve, deploy models on it, and wait until they answer.

There are three ways to deploy:

- `deploy_service` deploys a whole service below a route prefix of Serve's own proxy. Clusters use it.
- `deploy_inside` deploys a whole service without HTTP, for a pipeline's own processes.
- `deploy_models` deploys the replicas alone, for `python -m serve`, whose front has an HTTP server of its own.

`python -m serve` uses neither of Serve's proxies. The Python proxy costs 11 ms of CPU per request. HAProxy
(`RAY_SERVE_ENABLE_HA_PROXY=1`) binds 0.0.0.0 on the replicas' own HTTP ports and on the fixed ports 9101 and 8404,
whatever host is given, and shows every client as one of this machine. On a cluster whose ports are closed to others,
HAProxy is the faster ingress, and the same application runs behind it.

Without keys, a service listens on loopback only: Ray's own token does not guard Serve's port.
"""

import contextlib
import logging
import socket
import time

import httpx
import ray
import ray.serve as ray_serve
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
    """Start Serve on this Ray cluster, or find it running; return the "http://host:port" that it listens on.

    Port 0 takes a free one. A Serve that already runs keeps its own host and port. Raises ConfigError for a port that
    is taken.
    """
    logging.getLogger("ray.serve").setLevel(logging.WARNING)  # at INFO it writes a line or two per call
    running = running_http_options()
    if running is None:
        port = port or free_port(host)
        refuse_taken_port(host, port)
        ray_serve.start(proxy_location="HeadOnly", http_options=HTTPOptions(host=host, port=port), logging_config=QUIET)
        return f"http://{host}:{port}"
    if port not in (0, running.port):
        logger.info("Serve already runs on port %d of this Ray cluster; port %d is not used", running.port, port)
    return f"http://{running.host}:{running.port}"


def start_serve_without_http() -> None:
    """Start Serve without HTTP; a Serve that already runs stays as it is.

    This is for a front that has an HTTP server of its own, and for a run's scorers, which only the run itself asks.
    """
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    ray_serve.start(proxy_location=ProxyLocation.Disabled, logging_config=QUIET)


def deploy_inside(settings: ServiceSettings, app_name: str, *, deadline_s: float) -> None:
    """Deploy (or replace) one service for this cluster alone, and return once every replica is up.

    The cluster's processes reach it through ClusterScorer. Raises what deploy_service raises.
    """
    begin_to_deploy_inside(settings, app_name)
    wait_until_up([app_name], deadline_s=deadline_s)


def begin_to_deploy_inside(settings: ServiceSettings, app_name: str) -> None:
    """Do what deploy_inside does, without waiting for the replicas: `wait_until_up` does that."""
    ray_serve.run_many(
        [ray_serve.RunTarget(service_app(with_verified_checkpoints(settings)), name=app_name, route_prefix=None)],
        wait_for_applications_running=False,
    )


def deploy_service(settings: ServiceSettings, app_name: str, route_prefix: str, *, deadline_s: float = 180.0) -> str:
    """Deploy (or replace) one service, and return its base URL once `/healthz` answers and every replica is up.

    Call start_serve first. Raises CheckpointError, before anything is deployed, when a directory holds no intact reward
    model. Raises ConfigError for a service without keys on an open host, and, with Serve's reasons, for a deployment
    that fails or is not up after `deadline_s` seconds; such a deployment stays, for a look at it or for its deletion.
    """
    settings = with_verified_checkpoints(settings)
    running = running_http_options()
    assert running is not None, "start_serve comes before deploy_service"
    refuse_open_host(running.host or "", settings)
    base_url = f"http://{running.host}:{running.port}{route_prefix.rstrip('/')}"
    started_s = time.monotonic()
    ray_serve.run_many(
        [ray_serve.RunTarget(service_app(settings), name=app_name, route_prefix=route_prefix)],
        wait_for_applications_running=False,
    )
    wait_until_up([app_name], deadline_s=deadline_s, base_url=base_url)
    names = ", ".join(model.model_name for model in settings.models)
    logger.info("service %s serves %s at %s after %.1f s", app_name, names, base_url, time.monotonic() - started_s)
    return base_url


def deploy_models(settings: ServiceSettings, *, deadline_s: float = 180.0) -> "dict[str, DeploymentHandle[object]]":
    """Deploy the replicas of every model, and return their handles by model name once all are up.

    Each model is an application of its own without HTTP. A second call replaces what has changed; a change of the
    checkpoint alone is a swap inside the running replicas. Raises what deploy_service raises.
    """
    refuse_no_keys(settings)
    settings = with_verified_checkpoints(settings)
    targets = [
        ray_serve.RunTarget(scorer_app(model, settings), name=model.model_name, route_prefix=None)
        for model in settings.models
    ]
    ray_serve.run_many(targets, wait_for_applications_running=False)
    wait_until_up([model.model_name for model in settings.models], deadline_s=deadline_s)
    return {model.model_name: ray_serve.get_app_handle(model.model_name) for model in settings.models}


def delete_service(app_name: str) -> None:
    """Take one service down once it has answered the requests it is working on. Other services stay."""
    ray_serve.delete(app_name)


def delete_all_services() -> None:
    """Take everything down that Serve runs, before its Ray ends.

    ray.serve.shutdown would also kill Serve's controller, and Ray 2.60 reports each call that then waits for it as a
    failed task that is tried again for ever.
    """
    client = _get_global_client(raise_if_no_controller_running=False)
    if client is not None:
        with contextlib.suppress(TimeoutError):  # after a minute; the end of Ray ends the rest
            client.delete_all_apps()


def with_verified_checkpoints(settings: ServiceSettings) -> ServiceSettings:
    """Return the settings with absolute paths of checkpoints, each of which has been verified.

    The replicas verify too; but here an error keeps its class and costs no deployment.
    """

    def verified(model: ModelSettings) -> ModelSettings:
        if model.checkpoint_dir is None:
            return model
        checkpoint_dir = model.checkpoint_dir.resolve()
        verify_checkpoint(checkpoint_dir, "reward_model")
        return model.model_copy(update={"checkpoint_dir": checkpoint_dir})

    return settings.model_copy(update={"models": tuple(verified(model) for model in settings.models)})


def wait_until_up(app_names: list[str], *, deadline_s: float, base_url: str | None = None) -> None:
    """Wait until every replica is up and, with a URL, the proxy routes to them.

    Raises ConfigError with Serve's reasons when a deployment has failed or the deadline is over.
    """
    started_s = time.monotonic()
    while not all(is_up(app_name, base_url) for app_name in app_names):
        if time.monotonic() - started_s > deadline_s:
            late_app = next(app_name for app_name in app_names if not is_up(app_name, base_url))
            raise ConfigError(f"The service {late_app!r} is not up after {deadline_s:.0f} s: {why_not_up(late_app)}")
        time.sleep(POLL_EVERY_S)


def is_up(app_name: str, base_url: str | None) -> bool:
    """Return whether the application runs and, with a URL, answers.

    Raises ConfigError when its deployment has failed for good.
    """
    status = ray_serve.status().applications[app_name].status
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
    """Return what Serve says about the application and its deployments, and the resources of the cluster."""
    application = ray_serve.status().applications[app_name]
    deployment_messages = [
        f"{name} {deployment.status.value}: {deployment.message}"
        for name, deployment in application.deployments.items()
        if deployment.message
    ]
    return "; ".join(
        [
            application.message or application.status.value,
            *deployment_messages,
            f"the cluster has {ray.cluster_resources()}",
        ]
    )


def running_http_options() -> HTTPOptions | None:
    """Return the HTTP options of the Serve that runs on this Ray cluster, or None if there is none."""
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
