"""The Serve application: the HTTP side in front of the replicas of every model.

    proxy ─HTTP─► FrontReplica ─handles─► ScorerReplica × num_replicas, for each model

`serve.app:build` is the import path for `serve run`, `serve deploy` (reward_model.yaml) and KubeRay. `python -m serve` has the same front in its
own process instead, and no proxy.
"""

import hashlib
import os
import time
from pathlib import Path
from typing import Any

from ray import serve
from ray.serve import Application
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import LoggingConfig
from starlette.types import ASGIApp, Receive, Scope, Send

from rm_robust.errors import ConfigError
from rm_robust.models.checkpoint import read_manifest
from rm_robust.runs.storage.copies import uri_of
from rm_robust.scoring.contract import ScoreReply, ScoreRequest
from serve.batching.front import Front
from serve.http.middleware import Guard
from serve.http.routes import score_reply, scoring_api
from serve.keys import KEYS_VARIABLE, keys_from_environment
from serve.replica import ScorerReplica, WhatToLoad, log_as_replica, scorer_options
from serve.settings import ModelSettings, ServiceSettings, checked_service
from serve.work import Refusal

FRONT_CPUS = 0.01
"""It waits for replicas most of the time; but it is work, which a head that offers no CPU is not to do."""
SPARE_S = 5.0
"""A front that ends first answers what it has begun."""
FRONT_BEYOND_LIMITS = 1000
"""Room beyond the queues' own limits, so that the front, and not Serve's proxy, refuses a burst's overflow with our error body."""
ANY_CHECKPOINT = Path("the one of user_config")
HAPROXY_VARIABLE = "RAY_SERVE_ENABLE_HA_PROXY"
QUIET = LoggingConfig(log_level="WARNING", enable_access_log=False)
"""Serve logs a line per request and a dozen per deployment otherwise."""
SHARED_OPTIONS: dict[str, Any] = {
    "max_constructor_retry_count": 2,  # a checkpoint that does not load will not load the twentieth time (Serve's default)
    "graceful_shutdown_wait_loop_s": 0.5,
    "logging_config": QUIET,
}


def front_api() -> ASGIApp:
    """What Serve hands HTTP requests to: the ASGI side of the FrontReplica in this process, which is made after this."""

    async def api(scope: Scope, receive: Receive, send: Send) -> None:
        if (
            scope["type"] == "lifespan"
        ):  # there is nothing to do then, and Serve sends it before there is a FrontReplica
            for step in ("startup", "shutdown"):
                await receive()
                await send({"type": f"lifespan.{step}.complete"})
            return
        await serve.get_replica_context().servable_object.api(scope, receive, send)  # type: ignore[attr-defined]

    return api


@serve.ingress(front_api)
class FrontReplica:
    """Holds no model: it answers while replicas work. In the same cluster, `handle.score.remote(ScoreRequest)` does without HTTP."""

    def __init__(self, settings: ServiceSettings, handles: "dict[str, DeploymentHandle[Any]]") -> None:
        own = log_as_replica()
        self._front = Front(settings, handles, service=own.app_name)
        self.api: ASGIApp = scoring_api(self._front, Guard(settings.api_keys))

    async def reconfigure(self, _: dict[str, int]) -> None:
        """Called before the first request."""
        await self._front.start()

    async def score(self, request: ScoreRequest) -> ScoreReply | Refusal:
        started_s = time.perf_counter()
        outcome = await self._front.score(request, request.model)
        status, reason = (outcome.status, outcome.type) if isinstance(outcome, Refusal) else (200, None)
        self._front.metrics.answered("handle", status, seconds=time.perf_counter() - started_s, reason=reason)
        return outcome if isinstance(outcome, Refusal) else score_reply(request, outcome)


def build(args: dict[str, Any]) -> Application:
    """Application builder for YAML `args`; keys that they leave out come from RM_ROBUST_API_KEYS where Serve builds the application.

    Raises ConfigError naming each wrong field (and repeating no value: one may be a key).
    """
    settings = checked_service(args, source="The scoring application's args")
    if not settings.api_keys and not settings.insecure_no_auth:
        settings = settings.model_copy(update={"api_keys": keys_from_environment()})
    return service_app(settings)


def service_app(settings: ServiceSettings) -> Application:
    """Every model behind one front.

    Raises ConfigError for settings without keys that do not say insecure_no_auth.
    """
    refuse_no_keys(settings)
    num_accepted = settings.limits.max_queued_requests * len(settings.models) + FRONT_BEYOND_LIMITS
    front = serve.deployment(
        name="front",
        num_replicas=settings.num_fronts,
        max_ongoing_requests=num_accepted,
        user_config={"version": 0},
        graceful_shutdown_timeout_s=settings.limits.request_timeout_s + SPARE_S,
        ray_actor_options={"num_cpus": FRONT_CPUS},
        **SHARED_OPTIONS,
    )(FrontReplica)
    # The front knows a model by its settings, but a change of checkpoint alone must leave the front as it is: it learns of that from the replicas.
    known = settings.model_copy(update={"models": tuple(without_checkpoint(model) for model in settings.models)})
    return front.bind(known, {model.model_name: scorer_app(model, settings) for model in settings.models})


def scorer_app(model: ModelSettings, settings: ServiceSettings) -> Application:
    """One model's replicas. Deploying it again with another checkpoint, and no other change, swaps the checkpoint in the replicas that are there."""
    checkpoint_dir = None if model.checkpoint_dir is None else str(model.checkpoint_dir)
    what = WhatToLoad(checkpoint_dir=checkpoint_dir, generation=time.time_ns())
    if model.checkpoint_dir is not None and (
        model.checkpoint_dir.is_dir() or uri_of(model.checkpoint_dir)
    ):  # not where a YAML is built away from the models
        what["checkpoint"] = read_manifest(model.checkpoint_dir).content_sha256
    known, timeout_s = without_checkpoint(model), settings.limits.batch_timeout_s
    deployment = serve.deployment(
        name=scorer_name(model), user_config=dict(what), **scorer_options(model), **SHARED_OPTIONS
    )(ScorerReplica)
    version = hashlib.sha256(
        f"{known.model_dump_json()} {timeout_s}".encode()
    ).hexdigest()  # without one, every deployment is a new one to Serve
    return deployment.options(_internal=True, version=version).bind(known, timeout_s)


def without_checkpoint(model: ModelSettings) -> ModelSettings:
    """The same for every checkpoint of the model, so that Serve sees no change."""
    return model if model.checkpoint_dir is None else model.model_copy(update={"checkpoint_dir": ANY_CHECKPOINT})


def scorer_name(model: ModelSettings) -> str:
    return f"scorer_{model.model_name}"


def refuse_no_keys(settings: ServiceSettings) -> None:
    if not settings.api_keys and not settings.insecure_no_auth:
        raise ConfigError(
            f"The service of {settings.models[0].model_name!r} has no keys. Make one with `python -m serve.keys NAME` and name the file of its line, set "
            f"api_keys, or {KEYS_VARIABLE}; or set insecure_no_auth, which answers clients on the same machine only."
        )
    if settings.insecure_no_auth and os.environ.get(HAPROXY_VARIABLE) == "1":
        raise ConfigError(
            f"{HAPROXY_VARIABLE} = 1 makes every client look like one of this machine, so insecure_no_auth would answer anybody. Use keys."
        )
