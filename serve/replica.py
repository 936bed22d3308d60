"""One model in one Serve replica.

Beside the event loop, one thread computes batches, and another loads the checkpoint that replaces the current one.
"""

import asyncio
import logging
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import ray.serve as ray_serve
from ray.serve.context import ReplicaContext

from rm_robust.cluster.log_lines import lines_are_of, start_logging
from rm_robust.errors import CheckpointError, RmRobustError
from serve.settings import ModelSettings
from serve.work import Batch, BatchScorer, BatchScores, OtherGeneration, ServedModel

logger = logging.getLogger(__name__)

NUM_BATCHES_PER_REPLICA = 2
"""The batches that a front sends to a replica at a time: one is computed, and one waits."""
LOOK_BACK_AT_LEAST_S, LOOK_BACK_AT_MOST_S = 2.0, 30.0


class WhatToLoad(TypedDict):
    """Serve's `user_config` of a model's replicas.

    A deployment that changes nothing else reconfigures the replicas that already run.
    """

    checkpoint_dir: str | None
    generation: int
    checkpoint: NotRequired[str]
    """The content hash of the checkpoint. A directory that has another hash by now is not loaded."""


def log_as_replica() -> ReplicaContext:
    """Let the warnings of this process name its replica, and return the replica's context.

    Serve's own lines follow SHARED_OPTIONS in app.py.
    """
    context = ray_serve.get_replica_context()
    start_logging(logging.WARNING)
    lines_are_of(context.app_name, "serve", f"{context.deployment} {context.replica_tag}")
    return context


class ScorerReplica:
    """Scores batches with one model.

    `handle.score.remote(Batch)` gives BatchScores, or OtherGeneration for a batch of another checkpoint.
    """

    def __init__(self, settings: ModelSettings, batch_timeout_s: float) -> None:
        self._settings, self._batch_timeout_s = settings, batch_timeout_s
        self._id = log_as_replica().replica_tag
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="scorer")
        self._scorer: BatchScorer | None = None
        self._reload_error: str | None = None
        self._batch_started_s: float | None = None

    async def reconfigure(self, to_load: WhatToLoad) -> None:
        """Load a checkpoint while the current one goes on scoring.

        If it cannot be loaded, the current one stays. For the first checkpoint, the error (CheckpointError, for
        example) is raised.
        """
        if self._scorer is not None and to_load.get("checkpoint") == self._scorer.served.checkpoint:
            self._scorer.served = replace(self._scorer.served, generation=to_load["generation"])
            self._reload_error = None
            return
        try:
            loaded = await asyncio.to_thread(load_scorer, self._settings, to_load)
        except (RmRobustError, OSError, RuntimeError) as error:  # torch's out-of-memory is a RuntimeError
            if self._scorer is None:
                raise
            logger.error("the checkpoint %s is not served: %s", to_load["checkpoint_dir"], error)
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
        """Raise when a batch hangs. Serve calls this every few seconds, and replaces a replica that raises."""
        started_s = self._batch_started_s
        if started_s is not None and time.monotonic() - started_s > self._batch_timeout_s:
            raise RuntimeError(f"a batch has been running for more than {self._batch_timeout_s:g} s")

    def _score(self, batch: Batch) -> BatchScores | OtherGeneration:
        assert self._scorer is not None
        scorer = self._scorer  # a reload may replace self._scorer before this batch ends
        if (scorer.served.generation, scorer.served.checkpoint) != (batch.generation, batch.checkpoint):
            return OtherGeneration(scorer.served)
        self._batch_started_s = time.monotonic()
        try:
            return BatchScores(self._id, scorer.score(batch.contents))
        finally:
            self._batch_started_s = None


def load_scorer(settings: ModelSettings, to_load: WhatToLoad) -> BatchScorer:
    """Load the model that the settings name. The imports are local so that a judge's replica never loads torch models.

    Raises CheckpointError for a checkpoint that cannot be served, or is no longer the one that was deployed.
    """
    checkpoint_dir = to_load["checkpoint_dir"]
    if checkpoint_dir is None:
        from serve.scorers.judge import JudgeScorer

        return JudgeScorer(settings, to_load["generation"])
    from serve.scorers.checkpoint_scorer import CheckpointScorer

    loaded = CheckpointScorer(settings, Path(checkpoint_dir), to_load["generation"])
    deployed_checkpoint = to_load.get("checkpoint", loaded.served.checkpoint)
    if loaded.served.checkpoint != deployed_checkpoint:
        raise CheckpointError(
            f"{checkpoint_dir} is now {loaded.served.checkpoint}, and {deployed_checkpoint} was deployed. "
            "Deploy it again to serve what is there."
        )
    return loaded


def scorer_options(settings: ModelSettings) -> dict[str, Any]:
    """Return Serve's options for the model's replicas.

    A front sends batches: two per replica keep it busy, and more than two make Serve add replicas.
    """
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
    return scaling | {
        "max_ongoing_requests": NUM_BATCHES_PER_REPLICA + 1,  # one more for a front that asks what is loaded
        "health_check_period_s": 2.0,
        "health_check_timeout_s": 5.0,  # a replica is replaced after three of them in a row
        # A swap waits so long for a hung replica. A batch that this cuts off is scored by another replica.
        "graceful_shutdown_timeout_s": 10.0,
        "ray_actor_options": {
            "num_cpus": settings.num_cpus,
            "num_gpus": settings.num_gpus,
            "resources": settings.resources,
        },
    }
