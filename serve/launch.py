"""Starts Serve and deploys scorers on it, waiting until they answer.

On loopback, unless the scorers have keys: Ray's own token does not guard Serve's port. One proxy, on the head node, where the driver of a
job runs; work on other nodes calls the scorer's handle instead.

HAProxy (`RAY_SERVE_ENABLE_HA_PROXY=1` in the environment of the process that first starts Serve) replaces the Python proxy and costs far
less CPU per request, but it binds 0.0.0.0 whatever host is given, and so do the replicas' own HTTP ports: it is not used. It
also takes the fixed ports 9101 and 8404 and one temp folder per machine unless RAY_SERVE_HAPROXY_* say otherwise.
"""

import logging
import socket
import time

import httpx
import ray
from ray import serve
from ray.serve.config import HTTPOptions
from ray.serve.context import _get_global_client  # the one way to ask a running Serve for its host and port
from ray.serve.schema import ApplicationStatus

from rm_robust.checkpoint import verify_checkpoint
from rm_robust.errors import ConfigError
from serve.app import QUIET, build_scoring_app
from serve.settings import ScoringAppSettings

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


def deploy_scorer(settings: ScoringAppSettings, app_name: str, route_prefix: str, *, deadline_s: float = 180.0) -> str:
    """Deploy (or replace) one scorer after start_serve; returns its base URL once `/healthz` answers and every replica is up.

    Raises CheckpointError before anything is deployed when the directory is no intact reward model, ConfigError for a scorer without keys on
    an open host, and with Serve's reasons when the deployment fails or is not up after `deadline_s` (it is left as it is, to be looked at or
    deleted).
    """
    if settings.checkpoint_dir is not None:
        checkpoint_dir = settings.checkpoint_dir.absolute()
        verify_checkpoint(checkpoint_dir, "reward_model")  # the replica does too; here its error keeps its class and costs no deployment
        settings = settings.model_copy(update={"checkpoint_dir": checkpoint_dir})
    running = running_http_options()
    assert running is not None, "start_serve comes before deploy_scorer"
    refuse_open_host(running.host or "", settings)
    base_url = f"http://{running.host}:{running.port}{route_prefix.rstrip('/')}"
    target = serve.RunTarget(build_scoring_app(settings), name=app_name, route_prefix=route_prefix)
    started_s = time.monotonic()
    serve.run_many([target], wait_for_applications_running=False)
    while not is_up(app_name, base_url):
        if time.monotonic() - started_s > deadline_s:
            raise ConfigError(f"The scorer {app_name!r} is not up after {deadline_s:.0f} s: {why_not_up(app_name)}")
        time.sleep(POLL_EVERY_S)
    logger.info("scorer %s serves %s at %s after %.1f s", app_name, settings.model_name, base_url, time.monotonic() - started_s)
    return base_url


def delete_scorer(app_name: str) -> None:
    """Take one scorer down, after the requests it is working on. Others stay."""
    serve.delete(app_name)


def is_up(app_name: str, base_url: str) -> bool:
    """Every replica is up and the proxy routes to them. Raises ConfigError when the deployment has failed for good."""
    status = serve.status().applications[app_name].status
    if status == ApplicationStatus.DEPLOY_FAILED:
        raise ConfigError(f"The scorer {app_name!r} could not be started: {why_not_up(app_name)}")
    if status != ApplicationStatus.RUNNING:
        return False
    try:
        return httpx.get(f"{base_url}/healthz", timeout=5, trust_env=False).status_code == 200
    except httpx.TransportError:
        return False


def why_not_up(app_name: str) -> str:
    """What Serve says of the application and its deployments, and what the cluster has."""
    application = serve.status().applications[app_name]
    said = [f"{name} {d.status.value}: {d.message}" for name, d in application.deployments.items() if d.message]
    return "; ".join([application.message or application.status.value, *said, f"the cluster has {ray.cluster_resources()}"])


def running_http_options() -> HTTPOptions | None:
    """Of the Serve instance on this Ray cluster, if there is one."""
    client = _get_global_client(raise_if_no_controller_running=False)
    return None if client is None else client.http_config


def refuse_open_host(host: str, settings: ScoringAppSettings) -> None:
    """Raise ConfigError for a scorer without keys on a host that others can reach."""
    if host not in LOOPBACK_HOSTS and not settings.api_keys:
        raise ConfigError(f"A scorer without keys listens on loopback only: host is {host!r}, use '127.0.0.1', or give it keys.")


def free_port(host: str) -> int:
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def refuse_taken_port(host: str, port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as Serve binds: a port in TIME_WAIT is free
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ConfigError(f"Port {port} on {host} cannot be used ({error.strerror}). Choose another, or 0 for a free one.") from error
