"""One model's queue: it puts the work items of many requests into batches and turns their scores into replies.

    score(request) ─prepare─► job ─► waiting ─take─► Batch ─call─► replica ─► job.results ─► Scored

A batch is filled up to a number of tokens. While a replica is idle, a batch leaves however full it is; while all
replicas are busy, it leaves when it is full.

This is not `@ray.serve.batch`, which collects whole calls inside one replica until a size or a waiting time is reached.
This queue stands in front of all replicas of a model, and does more:

- Splitting: a long request becomes parts of several batches, and shares them with the requests behind it.
- Cancelling: a request whose caller gives up, or whose time is over, leaves the queue at once and frees its room.
- Loss: no request is lost with a replica, because the replica's batch goes to another one.
- Generations: when the checkpoint changes, every request that lacks a score is prepared and scored again, so that no
  reply mixes the scores of two checkpoints.

Everything runs on one event loop. Only the preparation of large requests has a thread of its own.
"""

import asyncio
import logging
import math
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Protocol

from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RequestCancelledError

from rm_robust.errors import RmRobustError
from rm_robust.scoring.contract import ScoreResult
from serve.metrics import ModelMetrics
from serve.settings import ModelSettings, ServiceLimits
from serve.work import (
    Batch,
    BatchScores,
    OtherGeneration,
    Outcome,
    Prepared,
    Preparer,
    Refusal,
    Scored,
    ScoringRequest,
    ServedModel,
    WorkItem,
    parts_of,
)

logger = logging.getLogger(__name__)
REPLICA_GONE = (RayError, DeploymentUnavailableError, BackPressureError, RequestCancelledError)
"""What a call raises when its replica or node died, or when there is none: the batch can be sent again.

RayTaskError, a failure of our own code, is caught before these.
"""
AGAIN_AFTER_S = 0.25
"""Seconds before a batch is sent again whose replica is gone or has an older checkpoint."""
MAX_LOSSES = 8
"""The most batches of one request that may be lost with their replicas. A replica that dies may hold two of them."""
REPLICA_SEEN_WITHIN_S = 15.0
"""Seconds for which a replica that answered counts as one that can work."""
INLINE_CHARACTERS = 16_384
"""The most characters of a request that is prepared on the event loop (about 2 ms); a thread prepares larger ones."""
CHARACTERS_OF_A_MESSAGE = 64
"""The cost of preparing a message beside its text, in characters."""
MAX_RETRY_AFTER_S = 30


class BatchReply(Protocol):
    """A call in progress: a DeploymentResponse of Ray Serve."""

    def __await__(self) -> object: ...

    def cancel(self) -> None: ...


@dataclass(eq=False)
class Job:
    """One request that is in the queue or being scored."""

    request: ScoringRequest
    prepared: Prepared
    served: ServedModel
    done: asyncio.Future[Outcome]
    results: list[list[float] | None] = field(default_factory=list)
    to_send: deque[int] = field(default_factory=deque)
    """The indices of the items that are in no batch yet."""
    num_tokens: int = 0
    is_admitted: bool = False
    num_losses: int = 0

    def prepare_anew(self, prepared: Prepared, served: ServedModel) -> None:
        """Take the items that were prepared for `served`, and forget all scores."""
        self.prepared, self.served = prepared, served
        self.results = [None] * len(prepared.items)
        self.to_send = deque(range(len(prepared.items)))
        self.num_tokens = sum(item.num_tokens for item in prepared.items)
        self.is_admitted = True

    def score_results(self) -> list[ScoreResult]:
        """Return the scores input by input. Every item must have its scores."""
        scores: list[list[float]] = [[] for _ in self.prepared.counts]
        for item, result in zip(self.prepared.items, self.results, strict=True):
            assert result is not None, "an item has no scores yet"
            scores[item.input_index] += result
        return [
            ScoreResult(scores=input_scores, token_counts=counts)
            for input_scores, counts in zip(scores, self.prepared.counts, strict=True)
        ]


@dataclass(frozen=True)
class Claim:
    """The items of one job in a batch, prepared for `served`."""

    job: Job
    served: ServedModel
    indices: list[int]


class BatchQueue:
    """The queue of one model.

    `call` sends a batch to some replica. `load_preparer` makes the front's half for what the replicas have loaded.
    """

    def __init__(
        self,
        model: ModelSettings,
        limits: ServiceLimits,
        metrics: ModelMetrics,
        *,
        call: Callable[[Batch], BatchReply],
        load_preparer: Callable[[ServedModel], Preparer],
    ) -> None:
        self._model, self._limits, self._metrics = model, limits, metrics
        self._call, self._load_preparer = call, load_preparer
        self._served: ServedModel | None = None
        self._on_loop: Preparer | None = None
        self._in_thread: Preparer | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=f"prepare-{model.model_name}")
        self._jobs: dict[Job, None] = {}  # in the order of arrival
        self._waiting: deque[Job] = deque()
        self._num_queued_tokens = 0
        self._num_in_flight = 0
        self._seen_s: dict[str, float] = {}
        self._sending: set[asyncio.Task[None]] = set()
        self._adopting = asyncio.Lock()
        self._pump_is_due = False
        self._tokens_per_s = 0.0

    @property
    def served(self) -> ServedModel:
        """Return the model that requests are prepared for now. Call `adopt` first."""
        assert self._served is not None, "adopt comes first"
        return self._served

    @property
    def is_full(self) -> bool:
        return (
            len(self._jobs) >= self._limits.max_queued_requests
            or self._num_queued_tokens >= self._limits.max_queued_tokens
        )

    async def adopt(self, served: ServedModel) -> None:
        """Prepare requests for this checkpoint from now on, and prepare again those that lack a score.

        An older generation changes nothing.
        """
        async with self._adopting:
            if self._served is not None and not served.replaces(self._served):
                return
            try:
                preparers = [await asyncio.to_thread(self._load_preparer, served) for _ in range(2)]
            except RmRobustError:
                logger.exception("the checkpoint of generation %d cannot be read here", served.generation)
                raise
            self._on_loop, self._in_thread = preparers
            self._served = served
            for job in [job for job in self._jobs if job.is_admitted]:
                prepared, _ = await self._prepare(job.request)
                if job not in self._jobs:  # its caller has given up meanwhile
                    continue
                self._num_queued_tokens -= job.num_tokens
                job.num_tokens = 0
                if isinstance(prepared, Refusal):
                    self._finish(job, prepared)
                else:
                    job.prepare_anew(prepared, served)
                    self._num_queued_tokens += job.num_tokens
                await asyncio.sleep(0)
            self._waiting = deque(job for job in self._jobs if job.is_admitted and not job.done.done())
        self._pump_soon()

    async def score(self, request: ScoringRequest) -> Outcome:
        """Return the request's scores, all from one checkpoint, or the reason why there are none.

        Cancelling this call takes the request out of the queue.
        """
        if self.is_full:
            return self._overloaded()
        job = Job(request, Prepared([], []), self.served, asyncio.get_running_loop().create_future())
        self._jobs[job] = None  # counted from here, so that a burst cannot pass the limit while it is being prepared
        try:
            async with asyncio.timeout(self._limits.request_timeout_s):
                refusal = await self._admit(job)
                return refusal if refusal is not None else await job.done
        except TimeoutError:
            return Refusal(
                504, "timeout", f"No scores within request_timeout_s = {self._limits.request_timeout_s:g} s; try again."
            )
        finally:
            del self._jobs[job]
            self._num_queued_tokens -= job.num_tokens
            job.to_send.clear()
            job.done.cancel()
            self._metrics.queue(len(self._jobs), self._num_queued_tokens)

    async def _admit(self, job: Job) -> Refusal | None:
        prepared, served = await self._prepare(job.request)
        if isinstance(prepared, Refusal):
            return prepared
        num_tokens = sum(item.num_tokens for item in prepared.items)
        if num_tokens > self._limits.max_queued_tokens:
            return Refusal(
                413,
                "too_large",
                f"The request has {num_tokens} tokens, "
                f"the limit max_queued_tokens is {self._limits.max_queued_tokens}; split it.",
            )
        if self._num_queued_tokens + num_tokens > self._limits.max_queued_tokens:
            return self._overloaded()
        job.prepare_anew(prepared, served)
        self._num_queued_tokens += job.num_tokens
        self._metrics.queue(len(self._jobs), self._num_queued_tokens)
        self._waiting.append(job)
        self._pump_soon()
        return None

    async def _prepare(self, request: ScoringRequest) -> tuple[Prepared | Refusal, ServedModel]:
        assert self._on_loop is not None
        assert self._in_thread is not None
        if num_characters(request) <= INLINE_CHARACTERS:
            return self._on_loop.prepare(request), self.served
        while True:
            served, preparer = self.served, self._in_thread
            prepared = await asyncio.get_running_loop().run_in_executor(self._thread, preparer.prepare, request)
            if served is self.served:  # the checkpoint may have changed meanwhile
                return prepared, served

    def _overloaded(self) -> Refusal:
        wait_s = self._num_queued_tokens / self._tokens_per_s if self._tokens_per_s else 1
        message = f"The queue of {self._model.model_name} is full; try again after Retry-After seconds."
        return Refusal(429, "overloaded", message, min(MAX_RETRY_AFTER_S, max(1, math.ceil(wait_s))))

    def _pump_soon(self) -> None:
        """Send batches once this turn of the event loop is over, so that what arrives together leaves together."""
        if not self._pump_is_due:
            self._pump_is_due = True
            asyncio.get_running_loop().call_soon(self._pump)

    def _pump(self) -> None:
        self._pump_is_due = False
        while not self._adopting.locked() and (claims := self._take_if_due()):
            self._num_in_flight += 1
            task = asyncio.create_task(self._send(claims))
            self._sending.add(task)  # the event loop keeps only a weak reference to a task
            task.add_done_callback(self._sending.discard)

    def _take_if_due(self) -> list[Claim]:
        while self._waiting and not self._waiting[0].to_send:
            self._waiting.popleft()
        if self._num_in_flight < self._num_replicas():
            return self._take()
        can_send_ahead = self._num_in_flight < 2 * (self._model.max_replicas or self._model.num_replicas)
        return self._take() if can_send_ahead and self._fills_a_batch() else []

    def _fills_a_batch(self) -> bool:
        num_tokens = 0
        for job in self._waiting:
            for index in job.to_send:
                num_tokens += job.prepared.items[index].num_tokens
                if num_tokens >= self._model.max_batch_tokens:
                    return True
        return False

    def _num_replicas(self) -> int:
        since_s = time.monotonic() - REPLICA_SEEN_WITHIN_S
        self._seen_s = {replica: seen_s for replica, seen_s in self._seen_s.items() if seen_s > since_s}
        return max(self._model.num_replicas, len(self._seen_s))

    def _take(self) -> list[Claim]:
        """Return items for one batch, in the order of the queue.

        While other requests wait, one request gets no more than half of the batch's room.
        """
        claims: list[Claim] = []
        prompts: set[int] = set()
        room, is_empty = self._model.max_batch_tokens, True
        while self._waiting:
            job = self._waiting[0]
            share = room if len(self._waiting) == 1 else max(1, room // 2)
            indices: list[int] = []
            is_full = False
            while job.to_send and not is_full:
                item = job.prepared.items[job.to_send[0]]
                cost = self._cost(item, prompts)
                is_full = not is_empty and (cost > room or (bool(indices) and cost > share))
                if not is_full:
                    indices.append(job.to_send.popleft())
                    prompts.add(item.prompt_key)
                    room, share, is_empty = room - cost, share - cost, False
            if indices:
                claims.append(Claim(job, job.served, indices))
            self._waiting.popleft()
            if job.to_send:
                if not indices:  # the batch has no room for its next item
                    self._waiting.appendleft(job)
                    break
                self._waiting.append(job)
        return claims

    def _cost(self, item: WorkItem, prompts: set[int]) -> int:
        is_shared = self._model.share_prompts and item.prompt_key in prompts
        return item.num_completion_tokens if is_shared else item.num_tokens

    async def _send(self, claims: list[Claim]) -> None:
        served = claims[0].served
        contents = [claim.job.prepared.items[index].content for claim in claims for index in claim.indices]
        num_tokens = sum(claim.job.prepared.items[index].num_tokens for claim in claims for index in claim.indices)
        started_s = time.monotonic()
        is_lost = True
        try:
            reply = await self._answer(Batch(served.generation, served.checkpoint, contents))
            if isinstance(reply, BatchScores):
                seconds = time.monotonic() - started_s
                self._seen_s[reply.replica] = time.monotonic()
                self._tokens_per_s = (
                    0.9 * self._tokens_per_s + 0.1 * num_tokens / seconds
                    if self._tokens_per_s
                    else num_tokens / seconds
                )
                self._metrics.batch(
                    num_items=len(contents),
                    num_tokens=num_tokens,
                    fill=num_tokens / self._model.max_batch_tokens,
                    seconds=seconds,
                )
                self._deliver(claims, reply)
                is_lost = False
            elif isinstance(reply, OtherGeneration) and reply.served.replaces(served):
                await self.adopt(reply.served)  # this prepares these requests again
                is_lost = False
            elif isinstance(reply, OtherGeneration):
                self._metrics.batch_lost("replica_behind")
            else:
                self._count_losses(claims)
        except RayTaskError as error:
            is_lost = False
            logger.exception("a replica of %s failed", self._model.model_name)
            self._metrics.batch_lost("error")
            for claim in claims:
                self._finish(
                    claim.job,
                    Refusal(
                        500,
                        "internal_error",
                        f"The scorer failed ({type(error.cause).__name__}); the reason is in the server's log.",
                    ),
                )
        except RmRobustError:
            self._metrics.batch_lost("checkpoint_unreadable")  # `adopt` has logged it; the next batch tries again
        finally:
            self._num_in_flight -= 1
            if is_lost:
                asyncio.get_running_loop().call_later(AGAIN_AFTER_S, self._put_back, claims)
            self._pump_soon()

    def _count_losses(self, claims: list[Claim]) -> None:
        """Count the loss for each request of a lost batch, and give up a request that has too many.

        A request whose every batch kills its replica must not kill all replicas.
        """
        for claim in claims:
            claim.job.num_losses += 1
            if claim.job.num_losses > MAX_LOSSES:
                logger.error(
                    "a request was in %d batches of %s that did not come back", MAX_LOSSES + 1, self._model.model_name
                )
                message = (
                    f"{MAX_LOSSES + 1} batches with parts of this request did not come back from their replicas; "
                    "send less at a time, or try again later."
                )
                self._finish(claim.job, Refusal(503, "unavailable", message))

    async def _answer(self, batch: Batch) -> BatchScores | OtherGeneration | None:
        """Send the batch and return the reply, None if the replica is gone or hangs.

        Raises RayTaskError if the replica failed.
        """
        response = None
        try:
            async with asyncio.timeout(self._limits.batch_timeout_s):
                response = self._call(batch)
                reply = await response  # type: ignore[misc]
            assert isinstance(reply, BatchScores | OtherGeneration)
            return reply
        except TimeoutError:
            logger.warning(
                "a batch of %s is not back after %g s; it goes to another replica",
                self._model.model_name,
                self._limits.batch_timeout_s,
            )
            self._metrics.batch_lost("timeout")
            if response is not None:
                response.cancel()
        except RayTaskError:
            raise
        except REPLICA_GONE as error:
            logger.warning(
                "a replica of %s is gone (%s); its batch goes to another", self._model.model_name, type(error).__name__
            )
            self._metrics.batch_lost("replica_gone")
        return None

    def _put_back(self, claims: list[Claim]) -> None:
        for claim in claims:
            if claim.served is claim.job.served and claim.job in self._jobs and not claim.job.done.done():
                claim.job.to_send.extendleft(reversed(claim.indices))
                self._waiting.appendleft(claim.job)
        self._pump_soon()

    def _deliver(self, claims: list[Claim], reply: BatchScores) -> None:
        start = 0
        for claim in claims:
            job, results = claim.job, reply.results[start : start + len(claim.indices)]
            start += len(claim.indices)
            if claim.served is not job.served or job.done.done():  # meanwhile prepared again, or given up
                continue
            for index, result in zip(claim.indices, results, strict=True):
                if isinstance(result, str):
                    part = parts_of(job.request)[job.prepared.items[index].input_index]
                    self._finish(job, Refusal(500, "scoring_failed", f"{part.prompt_field}: {result}"))
                    break
                job.results[index] = result
            if not job.done.done() and not job.to_send and all(result is not None for result in job.results):
                self._finish(job, Scored(job.served, job.score_results(), job.prepared.num_cut))

    def _finish(self, job: Job, outcome: Outcome) -> None:
        job.to_send.clear()
        if not job.done.done():
            job.done.set_result(outcome)
            if isinstance(outcome, Scored):
                self._metrics.scored(outcome)


def num_characters(request: ScoringRequest) -> int:
    """Return roughly what preparing the request costs, in characters. A token id counts as four characters."""
    total = 0
    for part in parts_of(request):
        content = part.content
        if isinstance(content, list):
            total += 4 * len(content)
        elif isinstance(content, str):
            total += len(content)
        else:
            turns = (
                [content.prompt]
                if isinstance(content.prompt, str)
                else [message.get("content", "") for message in content.prompt]
            )
            total += sum(CHARACTERS_OF_A_MESSAGE + len(text) for text in (*turns, *content.completions))
    return total
