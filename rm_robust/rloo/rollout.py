"""What a step asks of the samplers, the rollout in flight, and what comes back. No formula lives here.

Shapes: P prompts, K completions per prompt, prompt-major.
"""

import hashlib
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from random import Random
from typing import Any

import ray
from ray.exceptions import ActorDiedError, ActorUnavailableError, GetTimeoutError

from rm_robust.config.rloo import RlooConfig
from rm_robust.data.chat import ChatFormat
from rm_robust.data.token_files import TokenisedGroup
from rm_robust.errors import ConfigError, RolloutError
from rm_robust.scoring.contract import ScoreInput
from rm_robust.training.loop import batch_indices

logger = logging.getLogger(__name__)

ACTOR_LOST = (ActorDiedError, ActorUnavailableError, GetTimeoutError)
"""What a call to an actor raises when the actor, its process or its node is gone, or does not answer in time."""


@dataclass(frozen=True)
class Completion:
    """One sampled completion. `sampler_logprobs[t]` is the sampler's log-probability (nats) of `token_ids[t]`."""

    token_ids: list[int]
    sampler_logprobs: list[float]
    is_truncated: bool
    policy_version: int


@dataclass(frozen=True)
class PromptCompletions:
    """One prompt of a rollout and its K sampled completions, in the sampler's order."""

    prompt_id: str
    prompt_ids: list[int]
    completions: list[Completion]


@dataclass(frozen=True)
class GenerationRequest:
    """What a sampler needs to write K completions of one prompt. The same seed and weights give the same completions."""

    prompt_id: str
    prompt_ids: list[int]
    num_completions: int
    max_new_tokens: int
    temperature: float
    top_p: float
    stop_token_ids: list[int]
    seed: int


@dataclass(frozen=True)
class Measurement:
    """Of one trainer's completions, in order: KL to the reference (nats, whole sequence); and means over their tokens."""

    kl: list[float]
    num_tokens: int
    entropy_mean: float
    sampler_gap_mean: float
    """Mean |log pi_trainer - log pi_sampler| a token: how far the vLLM engines are from the trainer."""
    sampler_gap_max: float
    sampler_kl_mean: float
    """KL(sampler || trainer) a token (k3, nats): engine mismatch and lag together."""


@dataclass(frozen=True)
class Update:
    """What one trainer did in a step; means over its optimiser steps."""

    loss: float
    """This rank's part of it."""
    clip_fraction: float
    """This rank's part of it."""
    gradient_norm: float
    learning_rate: float


class EnginesLostError(Exception):
    """Engines died, or gave nothing for too long. What they had not finished must be asked for again."""

    def __init__(self, engines: list[Any]) -> None:
        super().__init__(f"{len(engines)} engines are lost")
        self.engines = engines


class Rollout:
    """Asks once for every completion, again only for what was lost with an engine: no prompt is lost or comes twice."""

    def __init__(
        self,
        requests: list[GenerationRequest],
        *,
        on_finished: Callable[[int, PromptCompletions], None],
        silence_s: float,
    ) -> None:
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
            engine.generate.remote([self.requests[position] for position in part]): (engine, part)
            for engine, part in zip(engines, parts, strict=True)
            if part
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


def held_prompts(
    prompts: list[TokenisedGroup], num_held: int, *, seed: int
) -> tuple[list[TokenisedGroup], list[TokenisedGroup]]:
    """Prompts to sample from in training, and those held out for evaluation. Raises ConfigError when nothing would be left to train on."""
    if num_held >= len(prompts):
        raise ConfigError(
            f"rloo.evaluation.num_prompts = {num_held} leaves none of the {len(prompts)} RLOO prompts to train on; lower it, or add prompts."
        )
    held = set(Random(f"held:{seed}").sample(range(len(prompts)), num_held))
    return [p for i, p in enumerate(prompts) if i not in held], [p for i, p in enumerate(prompts) if i in held]


def prompts_of_step(prompts: list[TokenisedGroup], step: int, *, num_prompts: int, seed: int) -> list[TokenisedGroup]:
    """The prompts of update `step` (0-based): a function of (seed, step) alone, so that a resumed run goes on where it stopped."""
    return [prompts[i] for i in batch_indices(step, num_rows=len(prompts), batch_size=num_prompts, seed=seed)]


def generation_requests(
    prompts: list[TokenisedGroup],
    settings: RlooConfig,
    *,
    step: int,
    seed: int,
    stop_token_id: int,
    num_completions: int | None = None,
) -> list[GenerationRequest]:
    """One request a prompt for its completions (the settings' K, unless said otherwise); seeds differ by run, step and prompt."""
    return [
        GenerationRequest(
            prompt_id=prompt.group_id,
            prompt_ids=prompt.tokens.prompt_ids,
            num_completions=num_completions or settings.num_completions_per_prompt,
            max_new_tokens=settings.max_new_tokens,
            temperature=settings.temperature,
            top_p=1.0,
            stop_token_ids=[stop_token_id],
            seed=_request_seed(seed, step, position),
        )
        for position, prompt in enumerate(prompts)
    ]


def check_completions(
    completions: list[PromptCompletions], requests: list[GenerationRequest], *, policy_versions: range
) -> None:
    """Raise RolloutError unless every request has its completions, in order, each prompt's from one of the `policy_versions`."""
    if [c.prompt_id for c in completions] != [r.prompt_id for r in requests]:
        raise RolloutError(
            f"The engines answered {len(completions)} prompts in another order than the {len(requests)} asked. Restart the run; it resumes."
        )
    for answer, request in zip(completions, requests, strict=True):
        if len(answer.completions) != request.num_completions:
            raise RolloutError(
                f"Prompt {answer.prompt_id} has {len(answer.completions)} completions, {request.num_completions} were asked."
            )
        versions = {c.policy_version for c in answer.completions}
        if len(versions) > 1 or not versions <= set(policy_versions):
            raise RolloutError(
                f"Prompt {answer.prompt_id} has completions of policy versions {sorted(versions)}, allowed is one of {policy_versions.start} to "
                f"{policy_versions.stop - 1}."
            )


def score_input(prompt: TokenisedGroup, answer: PromptCompletions, chat: ChatFormat) -> ScoreInput:
    """What a scorer is asked of a prompt's completions."""
    return ScoreInput(prompt=prompt.prompt, completions=[chat.completion_text(c.token_ids) for c in answer.completions])


def split_evenly(num_items: int, num_parts: int) -> list[slice]:
    """Consecutive slices whose lengths differ by at most one."""
    bounds = [num_items * part // num_parts for part in range(num_parts + 1)]
    return [slice(start, end) for start, end in zip(bounds, bounds[1:], strict=False)]


def _request_seed(seed: int, step: int, position: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}:{step}:{position}".encode()).digest()[:4], "big") >> 1
