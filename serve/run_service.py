"""A run's own service on a cluster ends with its job, however that ends: to Serve an application is nobody's, and would hold its nodes for ever."""

import contextlib
import logging
import threading
import time
from typing import Any

import ray
from ray import serve

from rm_robust.ray_session import HEAD_RESOURCE
from rm_robust.run_claim import living_job

logger = logging.getLogger(__name__)

NAMESPACE = "rm_robust_services"
POLL_EVERY_S = 5.0
STARTED_WITHIN_S = 60.0


def end_with_this_job(app_name: str) -> None:
    """Have the application deleted when this job has ended; before it is deployed. An earlier job's keeper, of the same run, is gone when this returns."""
    forget_job(app_name)
    remote: Any = ray.remote(Keeper)
    keeper = remote.options(
        name=app_name,
        namespace=NAMESPACE,
        lifetime="detached",
        num_cpus=0,
        resources={HEAD_RESOURCE: 0.001},  # elsewhere it would keep a node that an autoscaler could end
    ).remote(app_name, ray.get_runtime_context().get_job_id())
    ray.get(keeper.__ray_ready__.remote(), timeout=STARTED_WITHIN_S)


def forget_job(app_name: str) -> None:
    """Nobody looks after the application any more."""
    with contextlib.suppress(ValueError):  # there is none
        ray.kill(ray.get_actor(app_name, namespace=NAMESPACE))
        _wait_until_free(app_name)


def end_unused_serve() -> None:
    """Of Serve without applications and without HTTP nothing is left behind: the next `serve deploy` on this cluster would get no HTTP either.

    A run that starts in this very moment finds it ended, fails, and goes on when it is submitted again.
    """
    status = serve.status()
    if not status.applications and not status.proxies:
        serve.shutdown()


class Keeper:
    """Looks every few seconds whether the job is still there."""

    def __init__(self, app_name: str, job_id: str) -> None:
        self._app_name, self._job_id = app_name, job_id
        self._own = ray.get_runtime_context().current_actor
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while living_job(self._job_id) is not None:
            time.sleep(POLL_EVERY_S)
        logger.warning("job %s has ended and left the service %s behind: it is deleted", self._job_id, self._app_name)
        serve.delete(self._app_name)
        end_unused_serve()
        ray.kill(self._own)


def _wait_until_free(app_name: str) -> None:
    """A killed actor's name is taken for another moment."""
    deadline_s = time.monotonic() + STARTED_WITHIN_S
    while time.monotonic() < deadline_s:
        ray.get_actor(app_name, namespace=NAMESPACE)  # ValueError when it is free
        time.sleep(0.1)
    raise TimeoutError(f"the keeper of the service {app_name} did not end within {STARTED_WITHIN_S:g} s")
