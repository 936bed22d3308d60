"""The Ray that a pipeline runs on: the cluster it was given, or a local one of this process's own, of which nothing is left behind."""

import atexit
import contextlib
import logging
import os

import psutil
import ray

logger = logging.getLogger(__name__)

WORKER_ENVIRONMENT = {
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_WAIT_POLICY": "PASSIVE",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "50",
}
"""PASSIVE: idle OpenMP threads sleep. Spinning, their default, takes the cores that trainer, engine and scorers share. Serve kills a proxy that is
not ready after three checks, of 5 s each by default: too few where every core is taken."""
DRIVER_VARIABLE = "RM_ROBUST_DRIVER"
"""In the environment of every worker of a local Ray: whose it is."""
WORKERS_END_S = 10


def connect_to_ray() -> None:
    """The job's or RAY_ADDRESS's cluster; otherwise a local one of this process's own, on loopback."""
    if ray.is_initialized():
        return
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    on_cluster = "RAY_ADDRESS" in os.environ
    environment = dict(WORKER_ENVIRONMENT)
    if not on_cluster:
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")  # nobody reclaims this machine
        logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)  # it warns that token authentication is on
        environment[DRIVER_VARIABLE] = driver = f"{os.getpid()} since {psutil.Process().create_time()}"
        atexit.register(shut_down, driver)
    ray.init(
        address=None if on_cluster else "local",
        include_dashboard=None if on_cluster else False,
        logging_level=logging.WARNING,
        runtime_env={"env_vars": environment},
    )


def shut_down(driver: str) -> None:
    """End a local Ray and whatever is left of its workers.

    A worker of Ray 2.60 may hang while it exits, when it has left the cluster and nobody knows of it any more (seen once in some hundred runs; the
    like: ray-project/ray#18533, #66231).
    """
    ray.shutdown()
    _, left = psutil.wait_procs(workers_of(driver), timeout=WORKERS_END_S)
    for process in left:
        logger.warning("killing process %d, a worker of Ray that did not end", process.pid)
        with contextlib.suppress(psutil.NoSuchProcess):  # it has ended after all
            process.kill()


def workers_of(driver: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(DRIVER_VARIABLE) == driver:
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
            continue  # gone, or another user's
    return found
