"""The Serve application: the HTTP side in front of the replicas of every model.

    proxy ─HTTP─► FrontReplica ─handles─► ScorerReplica × num_replicas, for each model

`serve.app:build` is the import path for `serve run`, `serve deploy` (reward_model.yaml) and KubeRay. `python -m serve`
has the same front in its own process instead, and no proxy.
"""

import hashlib
import os
import time
from pathlib import Path
from typing import Any

import ray.serve as ray_serve
from ray.serve import Application
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import LoggingConfig
from starlette.types import ASGIApp, Receive, Scope, Send

from rm_robust.errors import ConfigError
from rm_robust.models.checkpoint import read_manifest
from rm_robust.runs import files as run_files
from rm_robust.scoring.contract import ScoreReply, ScoreRequest
from serve.batching.front import Front
from serve.http.middleware import Guard
from serve.http.routes import score_reply, scoring_api
from serve.keys import KEYS_VARIABLE, keys_from_environment
from serve.replica import ScorerReplica, WhatToLoad, log_as_replica, scorer_options
from serve.settings import ModelSettings, ServiceSettings, checked_service
from serve.work import Refusal

FRONT_CPUS = 0.01
"""The CPUs that a front reserves: few, because it mostly waits for replicas.

With 0, Ray could place a front on a head node that offers no CPUs, and such a node is not for this work.
"""
SPARE_S = 5.0
"""Seconds beyond `request_timeout_s` in which a front that is to end still answers the requests that it has begun."""
FRONT_BEYOND_LIMITS = 1000
"""Requests that a front accepts beyond the queues' own limits.

The front, and not Serve's proxy, then refuses the overflow of a burst, with our error body.
"""
ANY_CHECKPOINT = Path("the one of user_config")
"""Stands for the checkpoint in settings that must be the same for every checkpoint; user_config has the real one."""
HAPROXY_VARIABLE = "RAY_SERVE_ENABLE_HA_PROXY"
QUIET = LoggingConfig(log_level="WARNING", enable_access_log=False)
"""Serve's logging: warnings only. By default, Serve writes a line per request and a dozen per deployment."""
SHARED_OPTIONS: dict[str, Any] = {
    "max_constructor_retry_count": 2,  # Serve's default is 20, but a checkpoint that does not load never will
    "graceful_shutdown_wait_loop_s": 0.5,
    "logging_config": QUIET,
}


def front_api() -> ASGIApp:
    """Return what Serve hands HTTP requests to: the ASGI side of this process's FrontReplica, which is made later."""

    async def api(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":  # Serve sends it before there is a FrontReplica, and there is nothing to do
            for step in ("startup", "shutdown"):
                await receive()
                await send({"type": f"lifespan.{step}.complete"})
            return
        await ray_serve.get_replica_context().servable_object.api(scope, receive, send)  # type: ignore[attr-defined]

    return api


@ray_serve.ingress(front_api)
class FrontReplica:
    """The front as a Serve replica. It holds no model: it answers while the models' replicas work.

    In the same cluster, `handle.score.remote(ScoreRequest)` gets scores without HTTP.
    """

    def __init__(self, settings: ServiceSettings, handles: "dict[str, DeploymentHandle[Any]]") -> None:
        context = log_as_replica()
        self._front = Front(settings, handles, service=context.app_name)
        self.api: ASGIApp = scoring_api(self._front, Guard(settings.api_keys))

    async def reconfigure(self, _: dict[str, int]) -> None:
        """Start the front. Serve calls this before the first request."""
        await self._front.start()

    async def score(self, request: ScoreRequest) -> ScoreReply | Refusal:
        started_s = time.perf_counter()
        outcome = await self._front.score(request, request.model)
        status, reason = (outcome.status, outcome.type) if isinstance(outcome, Refusal) else (200, None)
        self._front.metrics.answered("handle", status, seconds=time.perf_counter() - started_s, reason=reason)
        return outcome if isinstance(outcome, Refusal) else score_reply(request, outcome)


def build(args: dict[str, Any]) -> Application:
    """Build the application from a YAML's `args`.

    Keys that `args` leave out come from RM_ROBUST_API_KEYS on the machine where Serve builds the application. Raises
    ConfigError that names each wrong field and repeats no value, because one may be a key.
    """
    settings = checked_service(args, source="The scoring application's args")
    if not settings.api_keys and not settings.insecure_no_auth:
        settings = settings.model_copy(update={"api_keys": keys_from_environment()})
    return service_app(settings)


def service_app(settings: ServiceSettings) -> Application:
    """Return the application with every model behind one front.

    Raises ConfigError for settings without keys that do not say insecure_no_auth.
    """
    refuse_no_keys(settings)
    num_accepted = settings.limits.max_queued_requests * len(settings.models) + FRONT_BEYOND_LIMITS
    front = ray_serve.deployment(
        name="front",
        num_replicas=settings.num_fronts,
        max_ongoing_requests=num_accepted,
        user_config={"version": 0},  # any value: without one, Serve would not call FrontReplica.reconfigure
        graceful_shutdown_timeout_s=settings.limits.request_timeout_s + SPARE_S,
        ray_actor_options={"num_cpus": FRONT_CPUS},
        **SHARED_OPTIONS,
    )(FrontReplica)
    # The front knows a model by its settings. A change of the checkpoint alone must leave the front as it is: the front
    # learns of the new checkpoint from the replicas.
    known = settings.model_copy(update={"models": tuple(without_checkpoint(model) for model in settings.models)})
    return front.bind(known, {model.model_name: scorer_app(model, settings) for model in settings.models})


def scorer_app(model: ModelSettings, settings: ServiceSettings) -> Application:
    """Return the application of one model's replicas.

    A second deployment with another checkpoint and no other change swaps the checkpoint in the running replicas.
    """
    checkpoint_dir = None if model.checkpoint_dir is None else str(model.checkpoint_dir)
    to_load = WhatToLoad(checkpoint_dir=checkpoint_dir, generation=time.time_ns())
    # A YAML may be built on a machine that is away from the models.
    if model.checkpoint_dir is not None and run_files.is_reachable(model.checkpoint_dir):
        to_load["checkpoint"] = read_manifest(model.checkpoint_dir).content_sha256
    known, timeout_s = without_checkpoint(model), settings.limits.batch_timeout_s
    deployment = ray_serve.deployment(
        name=scorer_name(model), user_config=dict(to_load), **scorer_options(model), **SHARED_OPTIONS
    )(ScorerReplica)
    # Without a version, Serve takes every deployment for a new one and replaces the replicas.
    version = hashlib.sha256(f"{known.model_dump_json()} {timeout_s}".encode()).hexdigest()
    return deployment.options(_internal=True, version=version).bind(known, timeout_s)


def without_checkpoint(model: ModelSettings) -> ModelSettings:
    """Return settings that are the same for every checkpoint of the model, so that Serve sees no change."""
    return model if model.checkpoint_dir is None else model.model_copy(update={"checkpoint_dir": ANY_CHECKPOINT})


def scorer_name(model: ModelSettings) -> str:
    return f"scorer_{model.model_name}"


def refuse_no_keys(settings: ServiceSettings) -> None:
    """Raise ConfigError for settings without keys, unless insecure_no_auth is set and HAProxy is not used."""
    if not settings.api_keys and not settings.insecure_no_auth:
        raise ConfigError(
            f"The service of {settings.models[0].model_name!r} has no keys. Make one with `rm-robust keys NAME`; "
            f"then name the file with its line, or set api_keys or {KEYS_VARIABLE}. "
            "Or set insecure_no_auth, which answers clients on the same machine only."
        )
    if settings.insecure_no_auth and os.environ.get(HAPROXY_VARIABLE) == "1":
        raise ConfigError(
            f"{HAPROXY_VARIABLE} = 1 makes every client look like one of this machine, "
            "so insecure_no_auth would answer anybody. Use keys."
        )
