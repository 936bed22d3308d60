"""Time and memory of sampling from a policy, on vLLM engines with continuous batching.

A decoding step reads every weight once, and the keys and values of all its sequences. Below a few hundred sequences
this reading, and not the arithmetic, takes the time (Pope et al. 2022, section 2).
"""

import math
from dataclasses import dataclass

from research.scaling.hardware import Hardware
from research.scaling.shapes import ModelShape
from research.scaling.training import Tokens, forward_flops

GPU_MEMORY_FRACTION = 0.9
"""The default of vLLM's gpu_memory_utilization."""


@dataclass(frozen=True)
class Sampling:
    """The completions that all engines sample in one step."""

    num_prompts: int
    num_completions_per_prompt: int
    prompt_tokens: float
    """The mean length of a prompt."""
    completion_tokens: float
    """The mean length of a completion."""
    max_new_tokens: int

    @property
    def num_completions(self) -> int:
        return self.num_prompts * self.num_completions_per_prompt

    @property
    def num_sampled(self) -> float:
        return self.num_completions * self.completion_tokens

    def computed_prompt_tokens(self, cache_block_tokens: int) -> float:
        """Return the prompt tokens that the engines compute.

        A prompt's full cache blocks are computed once, and the rest is computed for each of its completions.
        """
        shared = self.prompt_tokens // cache_block_tokens * cache_block_tokens
        return self.num_prompts * (shared + self.num_completions_per_prompt * (self.prompt_tokens - shared))

    @property
    def longest_completion(self) -> float:
        """Return the expected length of the longest completion: the mean times 1 + 1/2 + … + 1/n, cut at the limit.

        This assumes that a completion ends with the same probability at every token.
        """
        harmonic = math.log(self.num_completions) + 0.5772 if self.num_completions > 1 else 1.0
        return min(self.max_new_tokens, self.completion_tokens * harmonic)


@dataclass(frozen=True)
class Engines:
    """The vLLM engines of a run."""

    count: int
    num_devices_each: int
    """The tensor-parallel size."""
    max_num_sequences: int
    bytes_per_value: int
    """Bytes of one weight, key or value."""

    @property
    def num_devices(self) -> int:
        return self.count * self.num_devices_each


def decode_step_bytes(shape: ModelShape, *, num_sequences: float, context_tokens: float, bytes_per_value: int) -> float:
    """Return the bytes that one decoding step reads: weights and caches. An untied embedding is only looked up."""
    weights = shape.num_layers * shape.layer_parameters + shape.embedding_parameters
    return bytes_per_value * weights + num_sequences * context_tokens * shape.kv_cache_bytes_per_token(bytes_per_value)


def generation_seconds(shape: ModelShape, sampling: Sampling, engines: Engines, hardware: Hardware) -> float:
    """Return the seconds of one step's completions: the prompts first, then the decoding steps.

    There are as many decoding steps as the longest completion has tokens, or more if the engines cannot take all
    sequences at once.
    """
    per_engine = sampling.num_sampled / engines.count
    num_steps = max(sampling.longest_completion, per_engine / engines.max_num_sequences)
    batch = per_engine / num_steps
    context = sampling.prompt_tokens + sampling.completion_tokens / 2
    rate = hardware.peak_flops_per_s * hardware.utilisation * engines.num_devices_each
    read = (
        decode_step_bytes(shape, num_sequences=batch, context_tokens=context, bytes_per_value=engines.bytes_per_value)
        / engines.num_devices_each
    )
    reading_s = read / (hardware.memory_bytes_per_s * hardware.decode_utilisation)
    computing_s = forward_flops(shape, Tokens(batch, context, batch, num_predicted=batch)) / rate
    num_prompt_tokens = sampling.computed_prompt_tokens(hardware.cache_block_tokens) / engines.count
    prompts_s = forward_flops(shape, Tokens(num_prompt_tokens, sampling.prompt_tokens / 2, 0)) / rate
    overhead_s = (
        per_engine * hardware.engine_token_s + sampling.num_completions / engines.count * hardware.engine_completion_s
    )
    return prompts_s + num_steps * (max(reading_s, computing_s) + hardware.engine_step_s) + overhead_s


def engine_memory_bytes(shape: ModelShape, engines: Engines) -> float:
    """Return the bytes of weights on one device of an engine. vLLM uses the rest of its share for the cache."""
    return engines.bytes_per_value * shape.policy_parameters / engines.num_devices_each


def cached_tokens(shape: ModelShape, engines: Engines, hardware: Hardware) -> float:
    """Return how many tokens' keys and values fit beside the weights of one engine, on all its devices together.

    The result is below 0 if the weights themselves do not fit.
    """
    free = GPU_MEMORY_FRACTION * hardware.memory_bytes - engine_memory_bytes(shape, engines)
    return free * engines.num_devices_each / shape.kv_cache_bytes_per_token(engines.bytes_per_value)
