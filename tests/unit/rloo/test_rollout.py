"""The requests of a step depend on run, step and prompt alone, and answers that do not match them are refused."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rm_robust.config.rloo import RlooConfig
from rm_robust.data.records import TokenGroup
from rm_robust.data.token_files import TokenisedGroup
from rm_robust.errors import RolloutError
from rm_robust.rloo.rollout import (
    Completion,
    GenerationRequest,
    PromptCompletions,
    check_completions,
    generation_requests,
    prompts_of_step,
    split_evenly,
)

PROMPTS = [
    TokenisedGroup(f"p{i}", [{"role": "user", "content": str(i)}], TokenGroup([i + 5], []), [], None) for i in range(7)
]
SETTINGS = RlooConfig(num_prompts_per_step=3, num_completions_per_prompt=4, max_new_tokens=9, temperature=0.7)


def requests_of(step: int, seed: int = 0) -> list[GenerationRequest]:
    prompts = prompts_of_step(PROMPTS, step, num_prompts=3, seed=seed)
    return generation_requests(prompts, SETTINGS, step=step, seed=seed, stop_token_id=2)


def answers(requests: list[GenerationRequest], *, version: int = 5) -> list[PromptCompletions]:
    completion = Completion([8, 2], [-0.1, -0.2], False, version)
    return [
        PromptCompletions(request.prompt_id, request.prompt_ids, [completion] * request.num_completions)
        for request in requests
    ]


def test_a_request_has_the_prompts_token_ids_and_the_settings() -> None:
    for request in requests_of(0):
        (prompt,) = [prompt for prompt in PROMPTS if prompt.group_id == request.prompt_id]
        assert request.prompt_ids == prompt.tokens.prompt_ids
        assert (
            request.num_completions,
            request.max_new_tokens,
            request.temperature,
            request.top_p,
            request.stop_token_ids,
        ) == (4, 9, 0.7, 1.0, [2])


def test_a_resumed_step_asks_for_the_same_and_no_two_requests_share_a_seed() -> None:
    assert requests_of(3) == requests_of(3)
    seeds = [request.seed for run in range(3) for step in range(50) for request in requests_of(step, run)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**31 for seed in seeds)


def test_seven_steps_of_three_go_three_times_through_seven_prompts() -> None:
    asked = [prompt.group_id for step in range(7) for prompt in prompts_of_step(PROMPTS, step, num_prompts=3, seed=0)]
    assert sorted(asked) == sorted([prompt.group_id for prompt in PROMPTS] * 3)


def test_complete_answers_of_the_current_policy_in_order_are_accepted() -> None:
    check_completions(answers(requests_of(0)), requests_of(0), policy_versions=range(5, 6))


def test_answers_in_another_order_missing_short_or_stale_are_refused() -> None:
    requests = requests_of(0)
    right = answers(requests)
    short = [replace(right[0], completions=right[0].completions[:-1]), *right[1:]]
    *fresh_completions, last_completion = right[2].completions
    stale_completions = [*fresh_completions, replace(last_completion, policy_version=4)]
    stale = [*right[:2], replace(right[2], completions=stale_completions)]
    for wrong, message in (
        (list(reversed(right)), "another order"),
        (right[:-1], "answered 2 prompts"),
        (short, "has 3 completions, 4 were asked for"),
    ):
        with pytest.raises(RolloutError, match=message):
            check_completions(wrong, requests, policy_versions=range(5, 6))
    with pytest.raises(RolloutError, match=rf"Prompt {right[2].prompt_id} has completions of policy versions \[4, 5\]"):
        check_completions(stale, requests, policy_versions=range(5, 6))


@given(num_items=st.integers(0, 40), num_parts=st.integers(1, 7))
def test_parts_follow_each_other_cover_everything_and_differ_by_at_most_one(num_items: int, num_parts: int) -> None:
    parts = [list(range(num_items))[part] for part in split_evenly(num_items, num_parts)]
    assert len(parts) == num_parts
    assert [item for part in parts for item in part] == list(range(num_items))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
