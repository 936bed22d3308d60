"""One scorer in one Serve replica: requests gather into batches, and one thread works through them beside the event loop."""

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor

from ray import serve

from rm_robust.scoring import ScoreRequest
from serve.scorer import DialectRequest, Outcome, Scorer, ServedModel
from serve.settings import ScoringAppSettings

STUCK_AFTER_S = 300.0
"""A batch that takes longer hangs (a driver or kernel that never returns): the health check fails and Serve replaces the replica."""


class ScorerReplica:
    """`handle.score.remote(ScoreRequest or DialectRequest)` gives Scored or Refusal; whole requests are batched, never split."""

    def __init__(self, settings: ScoringAppSettings) -> None:
        self._scorer = load_scorer(settings)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="scorer")
        self._batch_started_s: float | None = None
        self.score.set_max_batch_size(settings.max_batch_size)  # type: ignore[attr-defined]  # serve.batch adds both setters
        self.score.set_batch_wait_timeout_s(settings.batch_wait_s)  # type: ignore[attr-defined]

    @serve.batch
    async def score(self, requests: list[ScoreRequest | DialectRequest]) -> list[Outcome]:
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._score_batch, requests)

    async def describe(self) -> ServedModel:
        """Beside the batches, but within the same queue limits: a full replica does not answer."""
        return self._scorer.describe()

    def check_health(self) -> None:
        """Serve calls it every few seconds; raising replaces the replica."""
        started_s = self._batch_started_s
        if started_s is not None and time.monotonic() - started_s > STUCK_AFTER_S:
            raise RuntimeError(f"a batch has been running for more than {STUCK_AFTER_S:.0f} s")

    def _score_batch(self, requests: list[ScoreRequest | DialectRequest]) -> list[Outcome]:
        self._batch_started_s = time.monotonic()
        try:
            return self._scorer.score_requests(requests)
        finally:
            self._batch_started_s = None


def load_scorer(settings: ScoringAppSettings) -> Scorer:
    """The scorer that the settings name; imported here so that a judge's replica never loads torch models."""
    if settings.checkpoint_dir is None:
        from serve.judge_scorer import EmbeddedJudgeScorer

        return EmbeddedJudgeScorer(settings)
    from serve.checkpoint_scorer import CheckpointScorer

    return CheckpointScorer(settings, settings.checkpoint_dir)
