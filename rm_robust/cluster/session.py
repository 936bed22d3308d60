"""Connect a pipeline to Ray: to the cluster it was given, or to a local Ray that ends with this process."""

import atexit
import contextlib
import logging
import os
import secrets
import socket
from typing import Any

import psutil
import ray
from ray.exceptions import AuthenticationError

from rm_robust.cluster import worker_lines, worker_server
from rm_robust.cluster.environment import DRIVER_VARIABLE, this_driver, worker_environment
from rm_robust.cluster.interrupts import signals_kept
from rm_robust.errors import ClusterError

logger = logging.getLogger(__name__)
TRAIN_IS_POLLED_EVERY_S = "0.2"
"""Seconds after which Ray Train's controller looks again whether its workers are done; by default it waits two."""
WORKERS_END_S = 10
REACHED_WITHIN_S = 10.0
HEAD_RESOURCE = "node:__internal_head__"
"""A resource of Ray's own that only the head of a cluster has."""
_is_local = False


def is_local() -> bool:
    """Return whether this process uses a local Ray of its own, which ends with it."""
    return _is_local


def connect_to_ray() -> None:
    """Connect to the cluster of the job or of RAY_ADDRESS; without one, start a local Ray on loopback for this process.

    Raises ClusterError for a cluster that cannot be reached, refuses our token, or runs another version.
    """
    global _is_local
    if ray.is_initialized():
        return
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    on_cluster = "RAY_ADDRESS" in os.environ
    _is_local = not on_cluster
    environment = worker_environment()
    if not on_cluster:
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")  # nobody reclaims this machine
        os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", TRAIN_IS_POLLED_EVERY_S)
        # Ray warns there that token authentication is on.
        logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)
        make_own_token()
        environment[DRIVER_VARIABLE] = driver = this_driver()
        atexit.register(shut_down, driver)
    runtime_env: dict[str, Any] = {"env_vars": environment}
    if on_cluster:
        require_reachable(os.environ["RAY_ADDRESS"])
    elif (command := worker_server.start()) is not None:
        runtime_env["py_executable"] = command
    try:
        with signals_kept():  # ray.init sets a handler of SIGTERM
            ray.init(
                address=None if on_cluster else "local",
                include_dashboard=None if on_cluster else False,
                logging_level=logging.WARNING,
                runtime_env=runtime_env,
            )
    except (ConnectionError, AuthenticationError, RuntimeError, ValueError) as error:
        if not on_cluster:
            raise
        raise ClusterError(why_not_connected(os.environ["RAY_ADDRESS"], error)) from error
    worker_lines.keep_from_ray()


def make_own_token() -> None:
    """Make a token for a local Ray, unless the environment names one.

    Ray 2.60 would otherwise make ~/.ray/auth_token, which every user may read if the umask allows it.
    """
    if not {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys():
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)


def require_reachable(address: str) -> None:
    """Raise ClusterError when nobody listens at "host:port".

    Ray itself would try for minutes, and then end the process without a message.
    """
    host, separator, port = address.rpartition(":")
    if "://" in address or not separator or not port.isdecimal():
        return  # "auto", ray://, or an address that Ray itself refuses
    try:
        socket.create_connection((host, int(port)), timeout=REACHED_WITHIN_S).close()
    except OSError as error:
        raise ClusterError(
            f"No Ray cluster can be reached at RAY_ADDRESS = {address} ({error}). "
            "Start its head, correct the address, or unset RAY_ADDRESS for a local run."
        ) from error


def why_not_connected(address: str, error: Exception) -> str:
    """Return a message with Ray's reason why an existing cluster cannot be used, and with the fix."""
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if "Version mismatch" in str(error):
        fix = (
            "Install the same versions of Python and Ray here and on every node "
            "(requirements/install.sh takes the locked ones)."
        )
        reason = " ".join(line.strip() for line in str(error).splitlines())
    elif isinstance(error, AuthenticationError):
        fix = "Copy the cluster's ~/.ray/auth_token here, or name it with RAY_AUTH_TOKEN_PATH."
    elif isinstance(error, ConnectionError):
        mode = os.environ.get("RAY_AUTH_MODE", "not set")
        fix = (
            f"Something listens there, but it does not let this process in. RAY_AUTH_MODE is {mode}. Set "
            "RAY_AUTH_MODE=token, and put the cluster's token in ~/.ray/auth_token, RAY_AUTH_TOKEN or the file that "
            "RAY_AUTH_TOKEN_PATH names."
        )
    else:
        fix = "Correct RAY_ADDRESS (host:port of the head's GCS, or auto), or unset it for a local run."
    return f"The Ray cluster at RAY_ADDRESS = {address} cannot be used: {reason} {fix}"


def head_does_no_work() -> bool:
    """Return whether the head offers no CPU because all work belongs on other nodes. The caller is connected to Ray."""
    return any(
        node["Alive"] and HEAD_RESOURCE in node["Resources"] and not node["Resources"].get("CPU")
        for node in ray.nodes()
    )


def is_on_head() -> bool:
    """Return whether this process runs on the head. The caller is connected to Ray."""
    node_id = ray.get_runtime_context().get_node_id()
    return any(node["NodeID"] == node_id and HEAD_RESOURCE in node["Resources"] for node in ray.nodes())


def keep_ray_datas_actors_here() -> None:
    """Make the detached actors of Ray 2.60's Data library on this process's node, if the cluster lacks them.

    Otherwise Ray makes them where the driver of the first dataset runs, "so that they fate-share with it". They outlive
    the job, so a node that an autoscaler has started for the driver would never be idle again. They ask for no CPU. The
    functions are Ray's own; tests/e2e/test_autoscaler.py checks that they make all such actors.
    """
    from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import (
        get_or_create_autoscaling_coordinator,
    )
    from ray.data._internal.execution.autoscaling_requester import get_or_create_autoscaling_requester_actor
    from ray.data._internal.execution.node_trackers.actor_location import get_or_create_actor_location_tracker
    from ray.data._internal.stats import get_or_create_stats_actor
    from ray.data._internal.stats_summary_actor import _get_or_create_stats_summary_actor
    from ray.data._internal.usage.actor import get_or_create_usage_collection_actor

    get_or_create_stats_actor()
    _get_or_create_stats_summary_actor()
    get_or_create_actor_location_tracker()
    get_or_create_autoscaling_requester_actor()
    get_or_create_autoscaling_coordinator()
    get_or_create_usage_collection_actor()


def shut_down(driver: str) -> None:
    """End the local Ray of `driver`, and kill those of its workers that do not end.

    A worker of Ray 2.60 may hang while it exits, after it has left the cluster and nobody tracks it any more (seen once
    in some hundred runs; similar: ray-project/ray#18533, #66231).
    """
    ray.shutdown()
    worker_server.stop()
    _, hanging = psutil.wait_procs(workers_of(driver), timeout=WORKERS_END_S)
    for process in hanging:
        logger.warning("killing process %d, a worker of Ray that did not end", process.pid)
        with contextlib.suppress(psutil.NoSuchProcess):  # it has ended by now
            process.kill()


def workers_of(driver: str) -> list[psutil.Process]:
    """Return the processes of this machine that are workers of the local Ray of `driver`."""
    workers = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(DRIVER_VARIABLE) == driver:
                workers.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
            continue  # it has ended, or is another user's
    return workers
