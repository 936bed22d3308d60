"""Sampling, weight updates and object-store traffic agree with hand counts and with real pickles."""

import pickle
from dataclasses import replace

import pytest

from research.scaling.generation import Engines, Sampling, cached_tokens, decode_step_bytes, generation_seconds
from research.scaling.hardware import GIB, GPUS
from research.scaling.plans import Lengths, rloo_plan
from research.scaling.publication import nccl_update, object_store_bytes, shared_memory_update
from research.scaling.shapes import SHAPES, ModelShape
from rm_robust.config.rloo import RlooConfig
from rm_robust.rloo.rollout import Completion, PromptCompletions

SMALL = ModelShape("small", 10, 10, 20, 2, 2, 1, 5, is_tied=True, has_qkv_bias=False)
"""A model with 2 layers of 920 parameters, a table of 100 and a norm of 10: 1,950 in total.

A token's keys and values are 2 x 2 x 5 numbers.
"""
INF = float("inf")
IDLE = replace(GPUS["h100"], peak_flops_per_s=INF, memory_bytes_per_s=INF, decode_utilisation=1.0, engine_step_s=0.0)
EIGHT_OF_FIVE = Sampling(
    num_prompts=2, num_completions_per_prompt=4, prompt_tokens=20, completion_tokens=5, max_new_tokens=10
)
ONE_ENGINE = Engines(1, 1, 8, bytes_per_value=2)


def test_a_decoding_step_reads_weights_and_caches() -> None:
    assert (
        decode_step_bytes(SMALL, num_sequences=3, context_tokens=7, bytes_per_value=2)
        == 2 * (2 * 920 + 100) + 3 * 7 * 20 * 2
    )


def test_generation_is_as_many_steps_as_the_longest_completion_has_tokens() -> None:
    """40 tokens need 10 steps, with 4 sequences of 22.5 tokens on average.

    The mean times 1 + … + 1/8 would be 13.6 steps, but 10 is the limit.
    """
    assert EIGHT_OF_FIVE.longest_completion == 10
    assert generation_seconds(SMALL, EIGHT_OF_FIVE, ONE_ENGINE, replace(IDLE, engine_step_s=0.5)) == 5
    assert generation_seconds(SMALL, EIGHT_OF_FIVE, ONE_ENGINE, replace(IDLE, engine_token_s=0.5)) == 20
    assert generation_seconds(SMALL, EIGHT_OF_FIVE, ONE_ENGINE, replace(IDLE, engine_completion_s=0.5)) == 4
    step_bytes = 2 * 1940 + 4 * 22.5 * 40
    assert generation_seconds(
        SMALL, EIGHT_OF_FIVE, ONE_ENGINE, replace(IDLE, memory_bytes_per_s=100.0)
    ) == pytest.approx(10 * step_bytes / 100)


def test_more_sequences_than_an_engine_takes_need_more_steps() -> None:
    two_at_a_time = replace(ONE_ENGINE, max_num_sequences=2)
    assert generation_seconds(SMALL, EIGHT_OF_FIVE, two_at_a_time, replace(IDLE, engine_step_s=0.5)) == 40 / 2 * 0.5


def test_completions_share_the_whole_blocks_of_their_prompt() -> None:
    """20 tokens fill one block of 16, which counts once, and leave 4 for each of the 4 completions.

    They fill no block of 128.
    """
    assert EIGHT_OF_FIVE.computed_prompt_tokens(16) == 2 * (16 + 4 * 4)
    assert EIGHT_OF_FIVE.computed_prompt_tokens(128) == 2 * 4 * 20


def test_the_cache_of_an_engine_is_what_its_weights_leave() -> None:
    """Llama 8B in bfloat16 on a GPU of 80 GiB has 72 GiB less 16.06 GB for the cache, at 128 KiB per token."""
    num_cached = cached_tokens(SHAPES["llama-3.1-8b"], ONE_ENGINE, GPUS["h100"])
    assert num_cached == pytest.approx((72 * GIB - 2 * 8_030_261_248) / (128 * 1024))


def test_an_update_beside_the_trainer_reads_twice_packs_once_and_probes() -> None:
    hardware = replace(IDLE, memory_bytes_per_s=100.0, reorder_bytes_per_s=10.0, update_s=1.0, probe_s=2.0)
    update = shared_memory_update(SMALL, hardware)
    assert update.num_bytes == 4 * 1950
    assert update.loaded_s == 2 * 7800 / 100 + 2 * 7800 / 10 + 1
    assert update.confirmed_s - update.loaded_s == pytest.approx(2 * 4 * 1940 / 100 + 2)


def test_an_update_over_nccl_sends_float32_once_and_a_sharded_one_is_gathered_before() -> None:
    hardware = replace(IDLE, network_bytes_per_s=100.0, link_bytes_per_s=50.0, host_bytes_per_s=10.0)
    whole = nccl_update(SMALL, ONE_ENGINE, hardware, num_trainers=4, is_sharded=False)
    sharded = nccl_update(SMALL, ONE_ENGINE, hardware, num_trainers=4, is_sharded=True)
    assert (whole.num_bytes, whole.gathered_bytes, whole.loaded_s) == (7800, 0, 78)
    assert sharded.gathered_bytes == 5850
    assert sharded.loaded_s == pytest.approx(78 + 5850 / 50 + 2 * 7800 / 10)


@pytest.mark.parametrize("vocab_size", [200, 60_000, 128_256])
def test_the_object_store_gets_what_completions_take_as_pickles(vocab_size: int) -> None:
    """Requests count once and completions twice. The formula leaves out field names and the lists themselves."""
    sampling = Sampling(
        num_prompts=4, num_completions_per_prompt=4, prompt_tokens=300, completion_tokens=200, max_new_tokens=400
    )
    ids = [vocab_size - 1 - i for i in range(100)] * 3
    completions = [Completion(ids[:200], [-0.1 - i / 7 for i in range(200)], False, 0) for _ in range(4)]
    answers = [PromptCompletions(f"p{i}", list(ids), completions) for i in range(4)]
    requests = [list(ids) for _ in range(4)]
    pickled = len(pickle.dumps(requests, protocol=5)) + 2 * sum(
        len(pickle.dumps(answer, protocol=5)) for answer in answers
    )
    assert object_store_bytes(sampling, vocab_size) == pytest.approx(pickled, rel=0.1)


def test_a_balanced_ratio_makes_generation_last_as_long_as_training() -> None:
    settings = RlooConfig(num_engines=2, tensor_parallel_size=2)
    plan = rloo_plan(settings, SHAPES["llama-3.2-1b"], (), Lengths(100, 40), GPUS["h100"])
    engine_devices, num_trainers = 2 * 2, settings.trainers.num_workers
    needed = plan.engine_devices_per_trainer * num_trainers
    assert plan.generate_s * engine_devices / needed == pytest.approx(plan.measure_s + plan.update_s)


def test_an_update_of_one_micro_batch_has_no_forward_pass_of_its_own() -> None:
    """`measure` keeps the graph, so an update is a backward pass alone, which costs two forward passes.

    `measure` itself has one forward pass of the policy and one of the reference.
    """
    shape, lengths, gpu = SHAPES["llama-3.2-1b"], Lengths(100, 40), replace(GPUS["h100"], memory_bytes_per_s=INF)
    kept = rloo_plan(RlooConfig(max_tokens_per_micro_batch=10**6), shape, (), lengths, gpu)
    again = rloo_plan(RlooConfig(max_tokens_per_micro_batch=4096), shape, (), lengths, gpu)
    assert kept.update_s == pytest.approx(kept.measure_s)
    assert again.update_s == pytest.approx(1.5 * kept.update_s)
