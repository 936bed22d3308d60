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
from serve.work import Batch, Outcome, Preparer, Refusal, Request, Scored, ServedModel, parts_of

logger = logging.getLogger(__name__)
DESCRIBED_WITHIN_S = 5.0
"""A replica that takes longer to answer is not ready."""
ASK_AGAIN_AFTER_S = 0.5
DESCRIPTION_IS_FRESH_S = 1.0
"""Whoever asks within it gets the last answer: /readyz needs no key, and must not keep replicas from scoring."""
COPIED_EVERY_S = 5.0
"""Ray sends on what it has every 10 s, by default."""
NO_ANSWER = (RayError, DeploymentUnavailableError, BackPressureError, TimeoutError, RmRobustError)
"""Also when the front cannot read what a replica has loaded."""


class Front:
    """Made once in each process that answers requests; `handles` reach the replicas of each model by its name. Call `start` first.

    `service` is what Ray's endpoint calls it; without one, its first model's name.
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
        """Returns once a replica of every model has said what it serves. Cancel it to give up."""
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
        gc.freeze()  # half a million objects of imported libraries, or every few seconds all requests wait 0.3 s until they have been looked through again

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
        """The first one answers requests that name none."""
        return [*self._queues, *self._ensembles]

    async def score(self, request: Request, model_name: str | None) -> Outcome:
        """Raw scores, or calibrated ones if the request asks for them; 404 for a model that is not served."""
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
        """What every model's replicas have loaded now, asked of one of each. Raises what NO_ANSWER holds."""
        served = {name: await self._describe(name) for name in self._queues}
        return [
            *served.values(),
            *(
                ensemble_of(ensemble, [served[name] for name in ensemble.members])
                for ensemble in self._ensembles.values()
            ),
        ]

    async def why_not_ready(self) -> str | None:
        """None when every model has a replica that answers, and room in its queue."""
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

    async def _score_by_ensemble(self, ensemble: EnsembleSettings, request: Request) -> Outcome:
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
    """The front's half of what a replica has loaded. Raises CheckpointError."""
    if served.checkpoint_dir is None:
        from serve.scorers.judge import JudgePreparer

        return JudgePreparer()
    from serve.scorers.checkpoint_preparer import CheckpointPreparer

    return CheckpointPreparer(served)


def calibrated(scored: Scored) -> Outcome:
    """(score - mean) / std of the checkpoint's held-out scores; 422 for a model whose manifest does not say them."""
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
    """One completion's scores by the members, as one. Coste et al., "Reward Model Ensembles Help Mitigate Overoptimization", Eq. 3 to 5."""
    if ensemble.aggregation is Aggregation.MIN:
        return min(scores)
    mean = statistics.fmean(scores)
    if ensemble.aggregation is Aggregation.MEAN:
        return mean
    return mean - ensemble.uncertainty_weight * statistics.pvariance(scores)


def ensemble_of(ensemble: EnsembleSettings, members: Sequence[ServedModel]) -> ServedModel:
    """The ensemble's identity: its members' checkpoints, in order, and how they are aggregated."""
    text = "\n".join([ensemble.model_dump_json(), *(member.checkpoint for member in members)])
    limits = [member.max_length_tokens for member in members if member.max_length_tokens is not None]
    return ServedModel(
        ensemble.model_name, "sha256:" + hashlib.sha256(text.encode()).hexdigest(), None, min(limits, default=None)
    )
