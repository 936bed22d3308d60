"""Check that a seed gives one world, that its sets share no prompt, and that RLOO can improve on the demonstrations."""

import functools
import hashlib
import itertools
import json
import os
import subprocess
import sys
from collections import defaultdict
from dataclasses import asdict
from statistics import median

import pytest

from rm_robust.data.records import NamedResponse
from rm_robust.data.world.corpus import (
    SFT_MIXTURE_WEIGHTS,
    World,
    make_world,
    mean_gold_score_by_model,
    mean_gold_score_of_demonstrations,
)
from rm_robust.data.world.gold_judge import gold_score
from rm_robust.data.world.task_families import FAMILIES, find_task
from rm_robust.errors import DataError

PRINT_DIGEST = """
import hashlib, json
from dataclasses import asdict
from rm_robust.data.world.corpus import make_world
world = make_world(seed=3, num_sft_examples=60, num_training_prompts=30, num_validation_prompts=12, num_rloo_prompts=12)
print(hashlib.sha256(json.dumps(asdict(world)).encode()).hexdigest())
"""


@functools.cache
def world_of(seed: int) -> World:
    return make_world(
        seed=seed, num_sft_examples=1200, num_training_prompts=600, num_validation_prompts=120, num_rloo_prompts=300
    )


def groups_of(world: World) -> dict[tuple[str, bool], list[NamedResponse]]:
    """Group responses by prompt and by whether an unseen model wrote them."""
    groups = defaultdict(list)
    for response in world.responses:
        groups[response.prompt_id, response.model in world.unseen_models].append(response)
    return groups


def prompt_sets(world: World) -> dict[str, set[str]]:
    text_of = {response.prompt_id: response.prompt[0]["content"] for response in world.responses}
    return {
        "sft": {example.prompt for example in world.sft_examples},
        "training": {text_of[prompt_id] for prompt_id in world.training_prompt_ids},
        "validation": {text_of[prompt_id] for prompt_id in world.validation_prompt_ids},
        "rloo": {prompt for _, prompt in world.rloo_prompts},
    }


def test_every_set_has_the_size_asked_for_and_no_prompt_twice() -> None:
    assert {name: len(prompts) for name, prompts in prompt_sets(world_of(0)).items()} == {
        "sft": 1200,
        "training": 600,
        "validation": 120,
        "rloo": 300,
    }


def test_no_prompt_is_in_two_sets() -> None:
    for first, second in itertools.combinations(prompt_sets(world_of(0)).values(), 2):
        assert not first & second


def test_every_set_takes_the_families_in_equal_parts() -> None:
    for prompts in prompt_sets(world_of(0)).values():
        num_by_family = dict.fromkeys(FAMILIES, 0)
        for prompt in prompts:
            task = find_task(prompt)
            assert task is not None
            num_by_family[task.family] += 1
        assert set(num_by_family.values()) == {len(prompts) // len(FAMILIES)}


def test_prompt_ids_are_unique_and_belong_to_the_text() -> None:
    worlds = [world_of(0), world_of(1)]
    text_of: dict[str, str] = {}
    for world in worlds:
        named = [
            (response.prompt_id, response.prompt[0]["content"]) for response in world.responses
        ] + world.rloo_prompts
        for prompt_id, prompt in named:
            assert text_of.setdefault(prompt_id, prompt) == prompt
    assert len(set(text_of.values())) == len(text_of)


def test_every_prompt_has_four_training_and_four_unseen_models_and_distinct_texts() -> None:
    world = world_of(0)
    groups = groups_of(world)
    assert len(groups) == 2 * (600 + 120)
    for (_, is_unseen), responses in groups.items():
        models = {response.model for response in responses}
        assert len(models) == len(responses) == len({response.completion for response in responses}) == 4
        assert models == set(world.unseen_models) if is_unseen else models < set(world.training_models)


def test_responses_are_single_user_turns_with_the_judges_score() -> None:
    for response in world_of(0).responses:
        (message,) = response.prompt
        assert message["role"] == "user"
        assert response.gold_score == gold_score(message["content"], response.completion)


def test_fewer_than_two_percent_of_different_texts_tie() -> None:
    num_pairs = num_ties = 0
    for responses in groups_of(world_of(0)).values():
        for first, second in itertools.combinations(responses, 2):
            num_pairs += 1
            num_ties += first.gold_score == second.gold_score
    assert num_ties / num_pairs < 0.02


def test_demonstrations_lie_above_the_median_training_model_and_clearly_below_the_best() -> None:
    world = world_of(0)
    gold_by_model = mean_gold_score_by_model(world.responses)
    training = [gold_by_model[model] for model in world.training_models]
    demonstrations = mean_gold_score_of_demonstrations(world.sft_examples)
    assert median(training) + 0.05 < demonstrations < max(training) - 0.05
    assert sum(SFT_MIXTURE_WEIGHTS.values()) == pytest.approx(1.0)
    assert list(gold_by_model.values()) == sorted(gold_by_model.values(), reverse=True)


def test_a_seed_gives_the_same_world_in_every_process_whatever_its_hash_seed() -> None:
    world = make_world(
        seed=3, num_sft_examples=60, num_training_prompts=30, num_validation_prompts=12, num_rloo_prompts=12
    )
    here = hashlib.sha256(json.dumps(asdict(world)).encode()).hexdigest()
    for hash_seed in ("1", "2"):
        process = subprocess.run(
            [sys.executable, "-c", PRINT_DIGEST],
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            capture_output=True,
            text=True,
            check=True,
        )
        assert process.stdout.strip() == here


def test_another_seed_gives_another_world() -> None:
    assert prompt_sets(world_of(0)) != prompt_sets(world_of(1))


def test_a_larger_sft_corpus_leaves_the_other_sets_as_they_were() -> None:
    sizes = {"num_training_prompts": 30, "num_validation_prompts": 12, "num_rloo_prompts": 12}
    small, large = (make_world(seed=0, num_sft_examples=count, **sizes) for count in (10, 600))
    assert (small.responses, small.rloo_prompts) == (large.responses, large.rloo_prompts)
    assert small.validation_prompt_ids == large.validation_prompt_ids


def test_asking_for_more_prompts_than_there_are_is_refused_with_both_numbers() -> None:
    available = 6 * min(family.num_distinct_prompts for family in FAMILIES.values())
    with pytest.raises(DataError, match=rf"has {available} prompts .* but {available + 1} were asked for"):
        make_world(
            seed=0, num_sft_examples=available, num_training_prompts=1, num_validation_prompts=0, num_rloo_prompts=0
        )
