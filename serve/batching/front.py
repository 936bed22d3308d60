"""The service without HTTP: every model's queue, ensembles of them, and calibration.

request ─► Front.score ─► BatchQueue of the model (of each member, for an ensemble) ─► Scored ─► calibrated, aggregated
"""

import asyncio
import gc
import hashlib
import logging
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ray.exceptions import RayError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from rm_robust.errors import RmRobustError
from rm_robust.scoring.contract import ScoreInput, ScoreRequest, ScoreResult
from serve.batching.queue import BatchQueue, BatchReply
from serve.metrics import ModelMetrics, ServiceMetrics
from serve.settings import Aggregation, EnsembleSettings, ServiceSettings
from serve.work import Batch, Outcome, Preparer, Refusal, Scored, ScoringRequest, ServedModel, parts_of

logger = logging.getLogger(__name__)
DESCRIBED_WITHIN_S = 5.0
"""Seconds within which a ready replica says what it serves."""
ASK_AGAIN_AFTER_S = 0.5
DESCRIPTION_IS_FRESH_S = 1.0
"""Seconds for which a replica's last answer is used again.

/readyz needs no key, so it must not be able to keep replicas from scoring.
"""
COPIED_EVERY_S = 5.0
"""Seconds between two copies of the metrics for Ray, which sends them on every 10 s by default."""
NO_ANSWER = (RayError, DeploymentUnavailableError, BackPressureError, TimeoutError, RmRobustError)
"""What asking a replica can raise. RmRobustError means that the front cannot read what the replica has loaded."""


class Front:
    """The service in one process that answers requests; such a process has one Front. Call `start` first.

    `handles` reach the replicas of each model by the model's name. `service` is the service's name on Ray's metrics
    endpoint; by default it is the name of the first model.
    """

    def __init__(
        self, settings: ServiceSettings, handles: Mapping[str, "DeploymentHandle[Any]"], *, service: str | None = None
    ) -> None:
        self.settings = settings
        self.metrics = ServiceMetrics()
        self._service = service or settings.models[0].model_name
        self._copying: asyncio.Task[None] | None = None
        self._handles = handles
        self._described: dict[str, tuple[float, ServedModel]] = {}
        self._describing = {model.model_name: asyncio.Lock() for model in settings.models}
        self._ensembles = {ensemble.model_name: ensemble for ensemble in settings.ensembles}
        self._queues = {
            model.model_name: BatchQueue(
                model,
                settings.limits,
                ModelMetrics(self.metrics, model.model_name),
                call=send_to(handles[model.model_name]),
                load_preparer=load_preparer,
            )
            for model in settings.models
        }

    async def start(self) -> None:
        """Wait until a replica of every model has said what it serves. Cancel this to give up."""
        while True:
            try:
                for name in self._queues:
                    await self._describe(name)
            except NO_ANSWER as error:
                logger.info("not all models are up: %s", error)
                await asyncio.sleep(ASK_AGAIN_AFTER_S)
            else:
                break
        if self._copying is None:
            self._copying = asyncio.create_task(self._copy_metrics())
        gc.collect()
        # Imported libraries hold half a million objects. Unless they are frozen, every few seconds all requests wait
        # 0.3 s while the garbage collector looks through them.
        gc.freeze()

    async def _copy_metrics(self) -> None:
        copy = self.metrics.copy_for_ray(self._service)
        try:
            while True:
                copy.write()
                await asyncio.sleep(COPIED_EVERY_S)
        except Exception:
            logger.exception("Ray's endpoint gets no more metrics of %s", self._service)
            raise

    @property
    def model_names(self) -> list[str]:
        """Return all names that requests may ask for. The first one answers requests that name no model."""
        return [*self._queues, *self._ensembles]

    async def score(self, request: ScoringRequest, model_name: str | None) -> Outcome:
        """Return raw scores, or calibrated ones if the request asks for them. An unknown model is refused with 404."""
        name = self.model_names[0] if model_name is None else model_name
        if name not in self.model_names:
            return Refusal(
                404,
                "model_not_found",
                f"model: there is no {name!r:.100}, this service has {', '.join(self.model_names)}.",
            )
        num_completions = sum(
            len(part.content.completions) if isinstance(part.content, ScoreInput) else 1 for part in parts_of(request)
        )
        limit = self.settings.limits.max_completions
        if num_completions > limit:
            return Refusal(
                413,
                "too_many",
                f"The request has {num_completions} completions, the limit max_completions is {limit}; split it.",
            )
        if name in self._ensembles:
            outcome = await self._score_by_ensemble(self._ensembles[name], request)
        else:
            outcome = await self._queues[name].score(request)
        if isinstance(outcome, Scored) and isinstance(request, ScoreRequest) and request.calibrated:
            return calibrated(outcome)
        return outcome

    async def models(self) -> list[ServedModel]:
        """Return what one replica of every model has loaded now. Raises what NO_ANSWER lists."""
        served = {name: await self._describe(name) for name in self._queues}
        return [
            *served.values(),
            *(
                ensemble_of(ensemble, [served[name] for name in ensemble.members])
                for ensemble in self._ensembles.values()
            ),
        ]

    async def why_not_ready(self) -> str | None:
        """Return the reason why the service is not ready.

        It is None when every model has a replica that answers, and room in its queue.
        """
        for name, queue in self._queues.items():
            if queue.is_full:
                return f"The queue of {name} is full."
            try:
                await self._describe(name)
            except NO_ANSWER as error:
                logger.info("not ready: %s", error)
                return f"No replica of {name} answered within {DESCRIBED_WITHIN_S:.0f} s."
        return None

    async def _describe(self, name: str) -> ServedModel:
        async with self._describing[name]:
            asked_s, served = self._described.get(name, (0.0, None))
            if served is None or time.monotonic() - asked_s > DESCRIPTION_IS_FRESH_S:
                served = await self._ask(name)
                self._described[name] = time.monotonic(), served
            return served

    async def _ask(self, name: str) -> ServedModel:
        response = self._handles[name].describe.remote()
        try:
            async with asyncio.timeout(DESCRIBED_WITHIN_S):
                served: ServedModel = await response
        except TimeoutError:
            response.cancel()  # type: ignore[no-untyped-call]
            raise
        await self._queues[name].adopt(served)
        return served

    async def _score_by_ensemble(self, ensemble: EnsembleSettings, request: ScoringRequest) -> Outcome:
        outcomes = await asyncio.gather(*(self._queues[name].score(request) for name in ensemble.members))
        members: list[Scored] = []
        for name, outcome in zip(ensemble.members, outcomes, strict=True):
            if isinstance(outcome, Scored) and ensemble.calibrate_members:
                outcome = calibrated(outcome)
            if isinstance(outcome, Refusal):
                return Refusal(outcome.status, outcome.type, f"{name}: {outcome.message}", outcome.retry_after_s)
            members.append(outcome)
        results = []
        for rows in zip(*(member.results for member in members), strict=True):  # one input, by every member
            scores = [aggregate(column, ensemble) for column in zip(*(row.scores for row in rows), strict=True)]
            results.append(ScoreResult(scores=scores, token_counts=rows[0].token_counts))
        return Scored(ensemble_of(ensemble, [member.served for member in members]), results, members[0].num_cut)


def send_to(handle: "DeploymentHandle[Any]") -> Callable[[Batch], BatchReply]:
    def send(batch: Batch) -> BatchReply:
        response: BatchReply = handle.score.remote(batch)
        return response

    return send


def load_preparer(served: ServedModel) -> Preparer:
    """Load the front's half of what a replica has loaded. Raises CheckpointError."""
    if served.checkpoint_dir is None:
        from serve.scorers.judge import JudgePreparer

        return JudgePreparer()
    from serve.scorers.checkpoint_preparer import CheckpointPreparer

    return CheckpointPreparer(served)


def calibrated(scored: Scored) -> Outcome:
    """Return (score - mean) / std for each score, with the mean and std of the checkpoint's scores on held-out pairs.

    A model whose manifest does not have them gets a refusal with 422.
    """
    if scored.served.calibration is None:
        message = (
            f"calibrated: {scored.served.model} has no score_mean and score_std in its manifest; ask for raw scores."
        )
        return Refusal(422, "invalid_request", message)
    mean, std = scored.served.calibration
    results = [
        ScoreResult(scores=[(score - mean) / std for score in result.scores], token_counts=result.token_counts)
        for result in scored.results
    ]
    return Scored(scored.served, results, scored.num_cut)


def aggregate(scores: Sequence[float], ensemble: EnsembleSettings) -> float:
    """Return the ensemble's score of one completion from its members' scores.

    The formulas are Eq. 3 to 5 of Coste et al., "Reward Model Ensembles Help Mitigate Overoptimization".
    """
    if ensemble.aggregation is Aggregation.MIN:
        return min(scores)
    mean = statistics.fmean(scores)
    if ensemble.aggregation is Aggregation.MEAN:
        return mean
    return mean - ensemble.uncertainty_weight * statistics.pvariance(scores)


def ensemble_of(ensemble: EnsembleSettings, members: Sequence[ServedModel]) -> ServedModel:
    """Return the ensemble as one model. Its identity is its members' checkpoints, in order, and its aggregation."""
    text = "\n".join([ensemble.model_dump_json(), *(member.checkpoint for member in members)])
    limits = [member.max_length_tokens for member in members if member.max_length_tokens is not None]
    return ServedModel(
        ensemble.model_name, "sha256:" + hashlib.sha256(text.encode()).hexdigest(), None, min(limits, default=None)
    )
