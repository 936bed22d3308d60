"""One model in one Serve replica: one thread computes batches beside the event loop, another loads the checkpoint that replaces the first."""

import asyncio
import logging
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from ray import serve
from ray.serve.context import ReplicaContext

from rm_robust.cluster.log_lines import lines_are_of, start_logging
from rm_robust.errors import CheckpointError, RmRobustError
from serve.settings import ModelSettings
from serve.work import Batch, BatchScorer, BatchScores, OtherGeneration, ServedModel

logger = logging.getLogger(__name__)


class WhatToLoad(TypedDict):
    """Serve's `user_config`: a deployment that changes nothing else reconfigures the replicas that are there."""

    checkpoint_dir: str | None
    generation: int
    checkpoint: NotRequired[str]
    """Its content hash; a directory that has another by now is not loaded."""


def log_as_replica() -> ReplicaContext:
    """Warnings of this replica's process say whose they are; Serve's own lines are as SHARED_OPTIONS say."""
    own = serve.get_replica_context()
    start_logging(logging.WARNING)
    lines_are_of(own.app_name, "serve", f"{own.deployment} {own.replica_tag}")
    return own


class ScorerReplica:
    """`handle.score.remote(Batch)` gives BatchScores, or OtherGeneration for a batch that was prepared for another checkpoint."""

    def __init__(self, settings: ModelSettings, batch_timeout_s: float) -> None:
        self._settings, self._batch_timeout_s = settings, batch_timeout_s
        self._id = log_as_replica().replica_tag
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="scorer")
        self._scorer: BatchScorer | None = None
        self._reload_error: str | None = None
        self._batch_started_s: float | None = None

    async def reconfigure(self, what: WhatToLoad) -> None:
        """Load a checkpoint while the one before goes on scoring. One that cannot be loaded leaves that in place; without one, it is fatal.

        Raises CheckpointError for the first checkpoint.
        """
        if self._scorer is not None and what.get("checkpoint") == self._scorer.served.checkpoint:
            self._scorer.served = replace(self._scorer.served, generation=what["generation"])
            self._reload_error = None
            return
        try:
            loaded = await asyncio.to_thread(load_scorer, self._settings, what)
        except (RmRobustError, OSError, RuntimeError) as error:  # torch's out-of-memory is a RuntimeError
            if self._scorer is None:
                raise
            logger.error("the checkpoint %s is not served: %s", what["checkpoint_dir"], error)
            self._reload_error = str(error)
            return
        self._scorer, self._reload_error = loaded, None

    async def score(self, batch: Batch) -> BatchScores | OtherGeneration:
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._score, batch)

    async def describe(self) -> ServedModel:
        assert self._scorer is not None, "Serve reconfigures a replica before its first call"
        served = self._scorer.served
        return replace(served, reload_error=self._reload_error)

    def check_health(self) -> None:
        """Serve calls it every few seconds; raising replaces the replica."""
        started_s = self._batch_started_s
        if started_s is not None and time.monotonic() - started_s > self._batch_timeout_s:
            raise RuntimeError(f"a batch has been running for more than {self._batch_timeout_s:g} s")

    def _score(self, batch: Batch) -> BatchScores | OtherGeneration:
        assert self._scorer is not None
        scorer = self._scorer  # the one of this whole batch
        if (scorer.served.generation, scorer.served.checkpoint) != (batch.generation, batch.checkpoint):
            return OtherGeneration(scorer.served)
        self._batch_started_s = time.monotonic()
        try:
            return BatchScores(self._id, scorer.score(batch.contents))
        finally:
            self._batch_started_s = None


def load_scorer(settings: ModelSettings, what: WhatToLoad) -> BatchScorer:
    """The model that the settings name; imported here so that a judge's replica never loads torch models."""
    if what["checkpoint_dir"] is None:
        from serve.scorers.judge import JudgeScorer

        return JudgeScorer(settings, what["generation"])
    from serve.scorers.checkpoint_scorer import CheckpointScorer

    loaded = CheckpointScorer(settings, Path(what["checkpoint_dir"]), what["generation"])
    wanted = what.get("checkpoint", loaded.served.checkpoint)
    if loaded.served.checkpoint != wanted:
        raise CheckpointError(
            f"{what['checkpoint_dir']} is now {loaded.served.checkpoint}, and {wanted} was deployed. Deploy it again to serve what is there."
        )
    return loaded


def scorer_options(settings: ModelSettings) -> dict[str, Any]:
    """Serve's options for the model's replicas. A front sends batches: two per replica keep it busy, and more than that are load to scale by."""
    scaling: dict[str, Any] = {"num_replicas": settings.num_replicas}
    if settings.max_replicas is not None:
        scaling = {
            "autoscaling_config": {
                "min_replicas": settings.num_replicas,
                "max_replicas": settings.max_replicas,
                "target_ongoing_requests": NUM_BATCHES_PER_REPLICA,
                "upscale_delay_s": settings.upscale_delay_s,
                "downscale_delay_s": settings.downscale_delay_s,
                "look_back_period_s": max(LOOK_BACK_AT_LEAST_S, min(settings.upscale_delay_s, LOOK_BACK_AT_MOST_S)),
            }
        }
    return (
        scaling
        | {
            "max_ongoing_requests": NUM_BATCHES_PER_REPLICA + 1,  # and somebody who asks what is loaded
            "health_check_period_s": 2.0,
            "health_check_timeout_s": 5.0,  # three times in a row
            "graceful_shutdown_timeout_s": 10.0,  # a swap waits for a hung replica's end; a batch that is cut off by it is scored by another
            "ray_actor_options": {
                "num_cpus": settings.num_cpus,
                "num_gpus": settings.num_gpus,
                "resources": settings.resources,
            },
        }
    )


NUM_BATCHES_PER_REPLICA = 2
"""One is computed, and one waits."""
LOOK_BACK_AT_LEAST_S, LOOK_BACK_AT_MOST_S = 2.0, 30.0
