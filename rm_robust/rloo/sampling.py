"""A rollout in flight: the completions of one step's prompts, asked of all engines, handed on as they finish. No formula lives here."""

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import ray
from ray.exceptions import ActorDiedError, ActorUnavailableError, GetTimeoutError

from rm_robust.records import GenerationRequest, PromptCompletions
from rm_robust.rloo.rollout import split_evenly

logger = logging.getLogger(__name__)

ACTOR_LOST = (ActorDiedError, ActorUnavailableError, GetTimeoutError)
"""What a call to an actor raises when the actor, its process or its node is gone, or does not answer in time."""


class EnginesLostError(Exception):
    """Engines died, or gave nothing for too long. What they had not finished must be asked for again."""

    def __init__(self, engines: list[Any]) -> None:
        super().__init__(f"{len(engines)} engines are lost")
        self.engines = engines


class Rollout:
    """Asks once for every completion, again only for what was lost with an engine: no prompt is lost or comes twice."""

    def __init__(self, requests: list[GenerationRequest], *, on_finished: Callable[[int, PromptCompletions], None], silence_s: float) -> None:
        """`on_finished(position, completions)` is called from another thread. An engine that gives nothing for `silence_s` counts as lost."""
        self.requests = requests
        self.num_redone = 0
        """Prompts that were asked for again."""
        self._on_finished, self._silence_s = on_finished, silence_s
        self._finished: dict[int, PromptCompletions] = {}
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="rollout")
        self._receiving: Future[None] | None = None

    def start(self, engines: Sequence[Any]) -> None:
        """Ask for what is missing; returns at once."""
        missing = [position for position in range(len(self.requests)) if position not in self._finished]
        if self._receiving is not None:
            self.num_redone += len(missing)
        parts = [missing[part] for part in split_evenly(len(missing), len(engines))]
        streams = {
            engine.generate.remote([self.requests[position] for position in part]): (engine, part) for engine, part in zip(engines, parts, strict=True) if part
        }
        self._receiving = self._pool.submit(self._receive, streams)

    def wait(self) -> list[PromptCompletions]:
        """All completions, in the order of the requests. Raises EnginesLostError when some are missing, once all other engines are done."""
        assert self._receiving is not None, "start first"
        self._receiving.result()
        self._pool.shutdown()
        return [self._finished[position] for position in range(len(self.requests))]

    def abandon(self) -> None:
        """Hand nothing on any more."""
        self._on_finished = lambda position, completions: None
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _receive(self, streams: dict[Any, tuple[Any, list[int]]]) -> None:
        lost: list[Any] = []
        while streams:
            ready, _ = ray.wait(list(streams), num_returns=1, timeout=self._silence_s, fetch_local=False)
            if not ready:
                lost += [engine for engine, _ in streams.values()]
                logger.warning("%d engines gave nothing for %g s and count as lost", len(streams), self._silence_s)
                break
            stream: Any = ready[0]
            engine, part = streams[stream]
            try:
                finished: list[tuple[int, PromptCompletions]] = ray.get(next(stream))
            except StopIteration:
                del streams[stream]
                continue
            except ACTOR_LOST as error:
                logger.warning("an engine is lost (%s)", type(error).__name__)
                lost.append(engine)
                del streams[stream]
                continue
            for number, completions in finished:
                self._finished[part[number]] = completions
                self._on_finished(part[number], completions)
        if lost:
            raise EnginesLostError(lost)
