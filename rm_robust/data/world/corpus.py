"""Make the embedded world's data from a seed, and write it to files of the kinds that users give.

The data are demonstrations, named and judged responses, and prompts for RLOO. The files hold jsonl rows, the split, and
the mean gold score of every response model.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import cycle
from pathlib import Path
from random import Random
from statistics import fmean
from typing import Any

from rm_robust.config.data import WorldConfig
from rm_robust.data.records import NamedResponse, SftExample
from rm_robust.data.world.gold_judge import gold_score
from rm_robust.data.world.response_models import TRAINING_MODELS, UNSEEN_MODELS, ResponseModel, respond
from rm_robust.data.world.task_families import FAMILIES
from rm_robust.errors import DataError
from rm_robust.runs import files as run_files

NUM_TRAINING_RESPONSES_PER_PROMPT = 4
MAX_DRAWS_FOR_DISTINCT_TEXT = 20
SFT_MIXTURE_WEIGHTS = {
    "professor": 0.24,
    "tutor": 0.19,
    "guide": 0.16,
    "clerk": 0.09,
    "pupil": 0.10,
    "hurrier": 0.08,
    "doubter": 0.08,
    "dreamer": 0.06,
}
"""The share of SFT completions that each training model writes.

The better half of the models writes more of them, but the others' mistakes and fillers are included too. A policy that
imitates this mixture starts above the median training model and below the best one, so RLOO can improve both its
answers and its style.
"""


@dataclass(frozen=True)
class World:
    """All data that the default run learns from. The four sets of prompts share no text."""

    sft_examples: list[SftExample]
    responses: list[NamedResponse]
    """The responses to every training and validation prompt: 4 by training models, then one by each unseen model."""
    training_prompt_ids: list[str]
    validation_prompt_ids: list[str]
    training_models: list[str]
    unseen_models: list[str]
    rloo_prompts: list[tuple[str, str]]
    """The pairs (prompt id, prompt text)."""


def make_world(
    *,
    seed: int,
    num_sft_examples: int,
    num_training_prompts: int,
    num_validation_prompts: int,
    num_rloo_prompts: int,
) -> World:
    """Make the world of `seed`, the same bytes on every machine.

    Every set takes the families in turn. The sets are drawn in the order validation, training, RLOO, SFT, so that a
    larger set does not change the sets drawn before it. Raises DataError if the families do not have that many distinct
    prompts.
    """
    num_prompts = num_validation_prompts + num_training_prompts + num_rloo_prompts + num_sft_examples
    check_enough_prompts(num_prompts)
    prompts = distinct_prompts(Random(f"{seed}/prompts"))
    validation_prompts, training_prompts, rloo_prompts, sft_prompts = (
        [next(prompts) for _ in range(count)]
        for count in (
            num_validation_prompts,
            num_training_prompts,
            num_rloo_prompts,
            num_sft_examples,
        )
    )
    return World(
        sft_examples=make_sft_examples(sft_prompts, Random(f"{seed}/sft")),
        responses=[
            response
            for prompt in (*training_prompts, *validation_prompts)
            for response in make_responses(prompt, Random(f"{seed}/{prompt}"))
        ],
        training_prompt_ids=[prompt_id_of(prompt) for prompt in training_prompts],
        validation_prompt_ids=[prompt_id_of(prompt) for prompt in validation_prompts],
        training_models=[model.name for model in TRAINING_MODELS],
        unseen_models=[model.name for model in UNSEEN_MODELS],
        rloo_prompts=[(prompt_id_of(prompt), prompt) for prompt in rloo_prompts],
    )


def check_enough_prompts(num_prompts: int) -> None:
    """Raise DataError if any family would run out of distinct prompts."""
    smallest = min(FAMILIES.values(), key=lambda family: family.num_distinct_prompts)
    num_available = smallest.num_distinct_prompts * len(FAMILIES)
    if num_prompts > num_available:
        raise DataError(
            f"The embedded world has {num_available} prompts ({smallest.num_distinct_prompts} of its smallest family, "
            f"{smallest.name}, and as many of each other), but {num_prompts} were asked for over all sets together. "
            "Ask for fewer, or use your own data."
        )


def distinct_prompts(rng: Random) -> Iterator[str]:
    """Yield prompts of the families in turn, no prompt twice."""
    seen = set[str]()
    for family in cycle(FAMILIES.values()):
        prompt = family.make(rng)
        while prompt in seen:
            prompt = family.make(rng)
        seen.add(prompt)
        yield prompt


def prompt_id_of(prompt: str) -> str:
    """Return an id that depends on the prompt's text alone."""
    return sha256(prompt.encode()).hexdigest()[:16]


def make_sft_examples(prompts: Sequence[str], rng: Random) -> list[SftExample]:
    """Make one demonstration for each prompt, by a training model drawn with SFT_MIXTURE_WEIGHTS."""
    weights = [SFT_MIXTURE_WEIGHTS[model.name] for model in TRAINING_MODELS]
    models = rng.choices(TRAINING_MODELS, weights, k=len(prompts))
    return [SftExample(prompt, respond(model, prompt, rng)) for prompt, model in zip(prompts, models, strict=True)]


def make_responses(prompt: str, rng: Random) -> list[NamedResponse]:
    """Make judged responses by 4 random training models, then by every unseen model. The texts of a group differ."""
    groups = (
        rng.sample(TRAINING_MODELS, NUM_TRAINING_RESPONSES_PER_PROMPT),
        UNSEEN_MODELS,
    )
    prompt_id, messages = prompt_id_of(prompt), [{"role": "user", "content": prompt}]
    return [
        NamedResponse(prompt_id, messages, model.name, completion, gold_score(prompt, completion))
        for models in groups
        for model, completion in zip(models, distinct_completions(models, prompt, rng), strict=True)
    ]


def distinct_completions(models: Sequence[ResponseModel], prompt: str, rng: Random) -> list[str]:
    """Make one completion by each model.

    A completion that repeats an earlier text is drawn again, up to 20 times, because equal texts cannot be ranked.
    """
    completions: list[str] = []
    for model in models:
        completion = respond(model, prompt, rng)
        for _ in range(MAX_DRAWS_FOR_DISTINCT_TEXT):
            if completion not in completions:
                break
            completion = respond(model, prompt, rng)
        completions.append(completion)
    return completions


def mean_gold_score_by_model(responses: Sequence[NamedResponse]) -> dict[str, float]:
    """Return the mean gold score of each response model, best first. A policy is compared with the highest one."""
    scores: dict[str, list[float]] = {}
    for response in responses:
        scores.setdefault(response.model, []).append(response.gold_score)
    return dict(
        sorted(
            ((model, fmean(values)) for model, values in scores.items()),
            key=lambda pair: -pair[1],
        )
    )


def mean_gold_score_of_demonstrations(examples: Sequence[SftExample]) -> float:
    """Return the mean gold score of the demonstrations.

    Raises DataError if a prompt is not one of the embedded world's tasks.
    """
    return fmean(gold_score(example.prompt, example.completion) for example in examples)


def write_world(target: Path, config: WorldConfig, *, seed: int) -> dict[str, Any]:
    """Commit sft.jsonl, responses.jsonl, rloo_prompts.jsonl, split.json and response_models.json in `target`.

    Returns the counts.
    """
    world = make_world(
        seed=seed,
        num_sft_examples=config.num_sft_examples,
        num_training_prompts=config.num_training_prompts,
        num_validation_prompts=config.num_validation_prompts,
        num_rloo_prompts=config.num_rloo_prompts,
    )
    run_files.commit(target, lambda folder: _write(folder, world))
    return {
        "num_sft_examples": len(world.sft_examples),
        "num_responses": len(world.responses),
        "num_rloo_prompts": len(world.rloo_prompts),
    }


def _write(folder: Path, world: World) -> None:
    _write_rows(folder / "sft.jsonl", ({"prompt": e.prompt, "completion": e.completion} for e in world.sft_examples))
    _write_rows(
        folder / "responses.jsonl",
        (
            {
                "prompt_id": r.prompt_id,
                "prompt": r.prompt,
                "model": r.model,
                "completion": r.completion,
                "gold_score": r.gold_score,
            }
            for r in world.responses
        ),
    )
    _write_rows(
        folder / "rloo_prompts.jsonl",
        ({"prompt_id": prompt_id, "prompt": prompt} for prompt_id, prompt in world.rloo_prompts),
    )
    split = {"unseen_models": sorted(world.unseen_models), "validation_prompt_ids": sorted(world.validation_prompt_ids)}
    (folder / "split.json").write_text(json.dumps(split) + "\n")
    means = {"training": _mean_gold(world, world.training_models), "unseen": _mean_gold(world, world.unseen_models)}
    (folder / "response_models.json").write_text(json.dumps(means, indent=2) + "\n")


def _mean_gold(world: World, models: Iterable[str]) -> dict[str, float]:
    scores: dict[str, list[float]] = {model: [] for model in models}
    for response in world.responses:
        if response.model in scores:
            scores[response.model].append(response.gold_score)
    return {model: sum(values) / len(values) for model, values in scores.items() if values}


def _write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    with path.open("w") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
