"""Ask the engines for a step's completions, follow the rollout, and check what comes back. No formula lives here.

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
from rm_robust.rloo.reward_requests import PromptRow
from rm_robust.scoring.contract import ScoreInput
from rm_robust.training.loop import batch_indices

logger = logging.getLogger(__name__)

ACTOR_LOST = (ActorDiedError, ActorUnavailableError, GetTimeoutError)
"""The errors of a call to an actor that is gone, with its process or its node, or that does not answer in time."""


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
    """The request to sample K completions of one prompt; equal seeds and weights give equal completions."""

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
    """One trainer's measurement of its completions: the KL of each, in order, and means over all their tokens.

    `kl` is the KL to the reference, in nats per completion; `entropy_mean` is in nats per token.
    """

    kl: list[float]
    num_tokens: int
    entropy_mean: float
    sampler_gap_mean: float
    """Mean |log pi_trainer - log pi_sampler| per token: how far the vLLM engines are from the trainer."""
    sampler_gap_max: float
    sampler_kl_mean: float
    """Mean KL(sampler || trainer) per token (k3, nats): engine mismatch and lag together."""


@dataclass(frozen=True)
class Update:
    """One trainer's report of a step: means over its optimiser steps."""

    loss: float
    """This rank's part of the loss; the parts of all ranks add up to it."""
    clip_fraction: float
    """This rank's part of the fraction of clipped ratios; the parts of all ranks add up to it."""
    gradient_norm: float
    learning_rate: float


class EnginesLostError(Exception):
    """Engines died, or returned nothing for too long. Their unfinished prompts must be sampled again."""

    def __init__(self, engines: list[Any]) -> None:
        super().__init__(f"{len(engines)} engines are lost")
        self.engines = engines


class Rollout:
    """Has every prompt sampled once, and again only if it was lost with an engine: none is missing or comes twice."""

    def __init__(
        self,
        requests: list[GenerationRequest],
        *,
        on_finished: Callable[[int, PromptCompletions], None],
        silence_s: float,
    ) -> None:
        """Prepare the rollout; `start` begins it.

        `on_finished(position, completions)` is called from another thread. An engine counts as lost after it has
        returned nothing for `silence_s`.
        """
        self.requests = requests
        self.num_redone = 0
        """Number of prompts that were sampled again."""
        self._on_finished, self._silence_s = on_finished, silence_s
        self._finished: dict[int, PromptCompletions] = {}
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="rollout")
        self._receiving: Future[None] | None = None

    def start(self, engines: Sequence[Any]) -> None:
        """Ask the engines for the missing completions; returns at once."""
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
        """Wait for all completions and return them in the order of the requests.

        Raises EnginesLostError when engines are lost, after all other engines have finished.
        """
        assert self._receiving is not None, "start first"
        self._receiving.result()
        self._pool.shutdown()
        return [self._finished[position] for position in range(len(self.requests))]

    def abandon(self) -> None:
        """Stop calling `on_finished`, and do not wait for the engines."""
        self._on_finished = lambda position, completions: None
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _receive(self, streams: dict[Any, tuple[Any, list[int]]]) -> None:
        lost: list[Any] = []
        while streams:
            ready, _ = ray.wait(list(streams), num_returns=1, timeout=self._silence_s, fetch_local=False)
            if not ready:
                lost += [engine for engine, _ in streams.values()]
                logger.warning("%d engines returned nothing for %g s and count as lost", len(streams), self._silence_s)
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
    """Split the prompts into those to train on and `num_held` that are held out for evaluation.

    Raises ConfigError when no prompt would be left to train on.
    """
    if num_held >= len(prompts):
        raise ConfigError(
            f"rloo.evaluation.num_prompts = {num_held} leaves none of the {len(prompts)} RLOO prompts to train on; "
            "lower it, or add prompts."
        )
    held = set(Random(f"held:{seed}").sample(range(len(prompts)), num_held))  # indices
    return [p for i, p in enumerate(prompts) if i not in held], [p for i, p in enumerate(prompts) if i in held]


def prompts_of_step(prompts: list[TokenisedGroup], step: int, *, num_prompts: int, seed: int) -> list[TokenisedGroup]:
    """Return the prompts of step `step` (0-based).

    They depend on the seed and the step alone, so a resumed run continues where it stopped.
    """
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
    """Return one request per prompt for `num_completions` completions, or for the settings' K when that is None.

    The sampling seeds differ by run seed, step and prompt.
    """
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
    """Check that every request has its completions, in order, each prompt's from one of the `policy_versions`.

    Raises RolloutError otherwise.
    """
    if [c.prompt_id for c in completions] != [r.prompt_id for r in requests]:
        raise RolloutError(
            f"The engines answered {len(completions)} prompts in another order than the {len(requests)} asked. "
            "Restart the run; it resumes."
        )
    for answer, request in zip(completions, requests, strict=True):
        if len(answer.completions) != request.num_completions:
            raise RolloutError(
                f"Prompt {answer.prompt_id} has {len(answer.completions)} completions, "
                f"{request.num_completions} were asked for."
            )
        versions = {c.policy_version for c in answer.completions}
        if len(versions) > 1 or not versions <= set(policy_versions):
            raise RolloutError(
                f"Prompt {answer.prompt_id} has completions of policy versions {sorted(versions)}; "
                f"one of {policy_versions.start} to {policy_versions.stop - 1} is allowed."
            )


def score_input(prompt: TokenisedGroup, answer: PromptCompletions, chat: ChatFormat) -> ScoreInput:
    """Return the input with which a scorer scores a prompt's completions."""
    return ScoreInput(prompt=prompt.prompt, completions=[chat.completion_text(c.token_ids) for c in answer.completions])


def prompt_row(prompt: TokenisedGroup, answer: PromptCompletions, *, step: int) -> PromptRow:
    """Return what reward functions get beside the texts."""
    return PromptRow(prompt.group_id, step, prompt.columns, [c.token_ids for c in answer.completions])


def split_evenly(num_items: int, num_parts: int) -> list[slice]:
    """Cut 0 to `num_items` into consecutive slices whose lengths differ by at most one."""
    bounds = [num_items * part // num_parts for part in range(num_parts + 1)]
    return [slice(start, end) for start, end in zip(bounds, bounds[1:], strict=False)]


def _request_seed(seed: int, step: int, position: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}:{step}:{position}".encode()).digest()[:4], "big") >> 1
