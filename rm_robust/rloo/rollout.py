"""What a step asks of the samplers, and what came back with its scores. Pure. Shapes: P prompts, K completions per prompt, prompt-major."""

import hashlib
from dataclasses import dataclass
from random import Random

from rm_robust.chat import ChatFormat
from rm_robust.config_rloo import RlooConfig
from rm_robust.errors import ConfigError, RolloutError
from rm_robust.records import GenerationRequest, PromptCompletions
from rm_robust.score_contract import ScoreInput
from rm_robust.token_files import TokenisedGroup
from rm_robust.training_loop import batch_indices


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


def held_prompts(prompts: list[TokenisedGroup], num_held: int, *, seed: int) -> tuple[list[TokenisedGroup], list[TokenisedGroup]]:
    """Prompts to sample from in training, and those held out for evaluation. Raises ConfigError when nothing would be left to train on."""
    if num_held >= len(prompts):
        raise ConfigError(f"rloo.evaluation.num_prompts = {num_held} leaves none of the {len(prompts)} RLOO prompts to train on; lower it, or add prompts.")
    held = set(Random(f"held:{seed}").sample(range(len(prompts)), num_held))
    return [p for i, p in enumerate(prompts) if i not in held], [p for i, p in enumerate(prompts) if i in held]


def prompts_of_step(prompts: list[TokenisedGroup], step: int, *, num_prompts: int, seed: int) -> list[TokenisedGroup]:
    """The prompts of update `step` (0-based): a function of (seed, step) alone, so that a resumed run goes on where it stopped."""
    return [prompts[i] for i in batch_indices(step, num_rows=len(prompts), batch_size=num_prompts, seed=seed)]


def generation_requests(
    prompts: list[TokenisedGroup], settings: RlooConfig, *, step: int, seed: int, stop_token_id: int, num_completions: int | None = None
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


def check_completions(completions: list[PromptCompletions], requests: list[GenerationRequest], *, policy_versions: range) -> None:
    """Raise RolloutError unless every request has its completions, in order, each prompt's from one of the `policy_versions`."""
    if [c.prompt_id for c in completions] != [r.prompt_id for r in requests]:
        raise RolloutError(f"The engines answered {len(completions)} prompts in another order than the {len(requests)} asked. Restart the run; it resumes.")
    for answer, request in zip(completions, requests, strict=True):
        if len(answer.completions) != request.num_completions:
            raise RolloutError(f"Prompt {answer.prompt_id} has {len(answer.completions)} completions, {request.num_completions} were asked.")
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
