"""Serve a run's own scorers on its cluster, and delete the service when its job ends, however the job ends.

Serve itself does not know which job an application belongs to, so the application would hold its nodes for ever.
"""

import contextlib
import hashlib
import logging
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import ray
import ray.serve as ray_serve

from rm_robust.cluster.session import HEAD_RESOURCE, is_local
from rm_robust.config.run import PipelineConfig, ReplicaConfig
from rm_robust.runs import files as run_files
from rm_robust.runs.claim import living_job
from rm_robust.runs.directory import Run
from rm_robust.scoring.client import RewardClient
from rm_robust.scoring.contract import Scorer
from serve.cluster_scorer import ClusterScorer
from serve.keys import new_key
from serve.settings import ModelSettings, ServiceLimits, ServiceSettings

logger = logging.getLogger(__name__)

NAMESPACE = "rm_robust_services"
POLL_EVERY_S = 5.0
STARTED_WITHIN_S = 60.0
"""Seconds within which a keeper must start, and within which a killed one must be gone."""
SERVED_WITHIN_S = 1800.0
"""Seconds within which the service must be up. An autoscaler may have to start the nodes first."""


@dataclass(frozen=True)
class ServedScorers:
    """The scorers of a run, which answer once `wait_until_up` has returned."""

    proxy: Scorer
    gold: Scorer
    wait_until_up: Callable[[], None]
    """Raises ConfigError when the service cannot be started, or is not up after SERVED_WITHIN_S seconds."""


@contextlib.contextmanager
def served_scorers(run: Run, *, proxy_dir: Path | None) -> Iterator[ServedScorers]:
    """Begin to serve the proxy reward model and the gold judge in this cluster, and yield a scorer for each.

    `proxy_dir` is the proxy's checkpoint; None where rloo.proxy is a service. The scorers work without HTTP, except for
    a proxy or a judge elsewhere, which is reached over HTTP. The service is deleted afterwards. It has no route in
    Serve's HTTP proxy, and nobody could use one: its single key is thrown away.
    """
    # This loads FastAPI, which only the driver of an RLOO stage needs.
    from serve.launch import begin_to_deploy_inside, delete_service, start_serve_without_http, wait_until_up

    config = run.config
    models = [] if proxy_dir is None else [served_model(config.serve.proxy_replica, "proxy", proxy_dir)]
    gold_url, timeout_s = config.serve.gold_url, config.serve.request_timeout_s
    if gold_url is None:
        is_embedded = config.serve.gold == "embedded"
        gold_dir = None if is_embedded else run_files.locate(config.serve.gold).absolute()
        models.append(served_model(config.serve.gold_replica, "gold", gold_dir))
    if not models:
        with scorers_elsewhere(config) as (proxy, gold):
            assert proxy is not None, "without a service of its own, the run has a proxy elsewhere"
            assert gold is not None, "and a judge elsewhere"
            yield ServedScorers(proxy, gold, lambda: None)
        return
    app_name, is_on_cluster = service_name(run), not is_local()
    start_serve_without_http()
    settings = ServiceSettings(
        models=tuple(models),
        api_keys=(new_key("run")[1],),
        limits=ServiceLimits(request_timeout_s=timeout_s),
    )
    if is_on_cluster:
        end_with_this_job(app_name)
    try:
        begin_to_deploy_inside(settings, app_name=app_name)
        is_up = partial(wait_until_up, [app_name], deadline_s=SERVED_WITHIN_S)
        with scorers_elsewhere(config) as (proxy, gold):
            yield ServedScorers(
                proxy or ClusterScorer(app_name, "proxy"), gold or ClusterScorer(app_name, "gold"), is_up
            )
    finally:
        delete_service(app_name)
        if is_on_cluster:
            forget_job(app_name)
            end_unused_serve()


@contextlib.contextmanager
def scorers_elsewhere(config: PipelineConfig) -> Iterator[tuple[RewardClient | None, RewardClient | None]]:
    """Yield clients of the proxy and of the judge; None for one that this run serves itself."""
    timeout_s = config.serve.request_timeout_s
    with contextlib.ExitStack() as stack:
        clients = [
            None if url is None else stack.enter_context(RewardClient(url, timeout_s=timeout_s))
            for url in (config.rloo.proxy_url, config.serve.gold_url)
        ]
        yield clients[0], clients[1]


def service_name(run: Run) -> str:
    """Return the service's name, which only this run's directory has.

    Two runs of one name in a cluster must not replace each other's models.
    """
    return f"{run.config.name}-{hashlib.sha256(run_files.shown(run.run_dir).encode()).hexdigest()[:8]}"


def served_model(replica: ReplicaConfig, model_name: str, checkpoint_dir: Path | None) -> ModelSettings:
    """Return the settings of one model: of a checkpoint, or, without one, of the embedded judge."""
    return ModelSettings(
        **replica.model_dump(),
        model_name=model_name,
        checkpoint_dir=checkpoint_dir,
        embedded_judge=checkpoint_dir is None,
        device="cuda" if replica.num_gpus else "cpu",
    )


def end_with_this_job(app_name: str) -> None:
    """Start a keeper, which deletes the application when this job has ended. Call this before deploying it.

    It takes the place of a keeper that an earlier job of the same run left behind.
    """
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
    """End the application's keeper, if there is one, and return when its name is free for another one."""
    with contextlib.suppress(ValueError):  # there is no keeper
        ray.kill(ray.get_actor(app_name, namespace=NAMESPACE))
        _wait_until_free(app_name)


def end_unused_serve() -> None:
    """Shut Serve down when it has neither applications nor HTTP.

    If it stayed, the next `serve deploy` on this cluster would get no HTTP either. A run that starts at this very
    moment finds Serve ended and fails; it goes on when it is submitted again.
    """
    status = ray_serve.status()
    if not status.applications and not status.proxies:
        ray_serve.shutdown()


class Keeper:
    """An actor that checks every few seconds whether the job still runs, and deletes the application after its end."""

    def __init__(self, app_name: str, job_id: str) -> None:
        self._app_name, self._job_id = app_name, job_id
        self._this_actor = ray.get_runtime_context().current_actor
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while living_job(self._job_id) is not None:
            time.sleep(POLL_EVERY_S)
        logger.warning("job %s has ended and left the service %s behind: it is deleted", self._job_id, self._app_name)
        ray_serve.delete(self._app_name)
        end_unused_serve()
        ray.kill(self._this_actor)


def _wait_until_free(app_name: str) -> None:
    """Wait until the name of a killed keeper is free, which takes a moment, and then raise ValueError.

    Raises TimeoutError when the name is not free after STARTED_WITHIN_S.
    """
    deadline_s = time.monotonic() + STARTED_WITHIN_S
    while time.monotonic() < deadline_s:
        ray.get_actor(app_name, namespace=NAMESPACE)  # raises ValueError when the name is free
        time.sleep(0.1)
    raise TimeoutError(f"the keeper of the service {app_name} did not end within {STARTED_WITHIN_S:g} s")
