"""The Serve application: HTTP routes in front of the scorer's replicas.

    proxy ─HTTP─► ScoringRoutes ─handle─► ScorerReplica × num_replicas

`serve.app:build` is the import path for `serve run`, `serve deploy` (reward_model.yaml) and KubeRay.
"""

from typing import Any

from pydantic import ValidationError
from ray import serve
from ray.serve import Application
from ray.serve.config import BackpressureConfig
from ray.serve.schema import LoggingConfig

from rm_robust.errors import ConfigError
from serve.deployment import ScorerReplica
from serve.keys import KEYS_VARIABLE, keys_from_environment
from serve.routes import ScoringRoutes
from serve.settings import ScoringAppSettings

QUEUE_FULL = BackpressureConfig(status_code=429, retry_after_s=1)
NUM_REQUESTS_BEING_REFUSED = 1000
"""Room in the routes beyond the scorer's own limits, so that they, and not Serve's proxy, answer a burst's overflow with our error body."""
QUIET = LoggingConfig(log_level="WARNING", enable_access_log=False)
"""Serve logs a line per request and a dozen per deployment otherwise."""
SHARED_OPTIONS: dict[str, Any] = {
    "backpressure_config": QUEUE_FULL,
    "max_constructor_retry_count": 2,  # a checkpoint that does not load will not load the twentieth time (Serve's default)
    "graceful_shutdown_wait_loop_s": 0.5,
    "logging_config": QUIET,
}


def build(args: dict[str, Any]) -> Application:
    """Application builder for YAML `args`; keys that they leave out come from RM_ROBUST_API_KEYS where Serve builds the application.

    Raises ConfigError naming each wrong field (and repeating no value: one may be a key).
    """
    try:
        settings = ScoringAppSettings.model_validate(args)
    except ValidationError as error:
        problems = [f"{'.'.join(map(str, p['loc'])) or 'args'}: {p['msg']}" for p in error.errors(include_url=False)]
        raise ConfigError("The scoring application's args are not valid:\n  " + "\n  ".join(problems)) from None
    if not settings.api_keys and not settings.insecure_no_auth:
        settings = settings.model_copy(update={"api_keys": keys_from_environment()})
    return build_scoring_app(settings)


def build_scoring_app(settings: ScoringAppSettings) -> Application:
    """One scorer behind its routes. The routes only parse and pass on, so they ask for no CPU of their own.

    Raises ConfigError for settings without keys that do not say insecure_no_auth.
    """
    if not settings.api_keys and not settings.insecure_no_auth:
        raise ConfigError(
            f"The scorer {settings.model_name!r} has no keys. Make one with `python -m serve.keys NAME` and name the file of its line, set api_keys, or "
            f"{KEYS_VARIABLE}; or set insecure_no_auth, which answers clients on the same machine only."
        )
    scorer = serve.deployment(
        name="scorer",
        num_replicas=settings.num_replicas,
        max_ongoing_requests=settings.max_ongoing_requests,
        max_queued_requests=settings.max_queued_requests,
        ray_actor_options={"num_cpus": settings.num_cpus, "num_gpus": settings.num_gpus, "resources": settings.resources},
        **SHARED_OPTIONS,
    )(ScorerReplica)
    num_accepted = settings.num_replicas * settings.max_ongoing_requests + settings.max_queued_requests
    routes = serve.deployment(
        name="routes",
        max_ongoing_requests=num_accepted + NUM_REQUESTS_BEING_REFUSED,
        max_queued_requests=num_accepted + NUM_REQUESTS_BEING_REFUSED,
        ray_actor_options={"num_cpus": 0},
        **SHARED_OPTIONS,
    )(ScoringRoutes)
    return routes.bind(scorer.bind(settings), settings)
