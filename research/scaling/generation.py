"""Time and memory of sampling from a policy, on vLLM engines with continuous batching.

A decoding step reads every weight once and the keys and values of all its sequences: below a few hundred sequences that, not arithmetic, is its time
(Pope et al. 2022, section 2).
"""

import math
from dataclasses import dataclass

from research.scaling.hardware import Hardware
from research.scaling.shapes import ModelShape
from research.scaling.training import Tokens, forward_flops

GPU_MEMORY_FRACTION = 0.9
"""vLLM's default gpu_memory_utilization."""


@dataclass(frozen=True)
class Sampling:
    """A step's completions, all engines."""

    num_prompts: int
    num_completions_per_prompt: int
    prompt_tokens: float
    """Mean."""
    completion_tokens: float
    """Mean."""
    max_new_tokens: int

    @property
    def num_completions(self) -> int:
        return self.num_prompts * self.num_completions_per_prompt

    @property
    def num_sampled(self) -> float:
        return self.num_completions * self.completion_tokens

    def computed_prompt_tokens(self, cache_block_tokens: int) -> float:
        """A prompt's whole blocks are computed once, the rest for each of its completions."""
        shared = self.prompt_tokens // cache_block_tokens * cache_block_tokens
        return self.num_prompts * (shared + self.num_completions_per_prompt * (self.prompt_tokens - shared))

    @property
    def longest_completion(self) -> float:
        """Expected, of lengths that end with the same chance at every token (assumed): the mean times 1 + 1/2 + … + 1/n, cut at the limit."""
        harmonic = math.log(self.num_completions) + 0.5772 if self.num_completions > 1 else 1.0
        return min(self.max_new_tokens, self.completion_tokens * harmonic)


@dataclass(frozen=True)
class Engines:
    """`num_devices_each`: tensor parallelism. `bytes_per_value`: of weights, keys and values."""

    count: int
    num_devices_each: int
    max_num_sequences: int
    bytes_per_value: int

    @property
    def num_devices(self) -> int:
        return self.count * self.num_devices_each


def decode_step_bytes(shape: ModelShape, *, num_sequences: float, context_tokens: float, bytes_per_value: int) -> float:
    """What one decoding step reads: weights (an untied embedding is looked up) and caches."""
    weights = shape.num_layers * shape.layer_parameters + shape.embedding_parameters
    return bytes_per_value * weights + num_sequences * context_tokens * shape.kv_cache_bytes_per_token(bytes_per_value)


def generation_seconds(shape: ModelShape, sampling: Sampling, engines: Engines, hardware: Hardware) -> float:
    """Of one step's completions: prompts, then as many decoding steps as the longest completion has tokens, or as the engines need for all."""
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
    """Weights of one device of an engine; vLLM gives the rest of its share to the cache."""
    return engines.bytes_per_value * shape.policy_parameters / engines.num_devices_each


def cached_tokens(shape: ModelShape, engines: Engines, hardware: Hardware) -> float:
    """Tokens whose keys and values fit beside the weights of one engine (all its devices); below 0 the weights themselves do not."""
    free = GPU_MEMORY_FRACTION * hardware.memory_bytes - engine_memory_bytes(shape, engines)
    return free * engines.num_devices_each / shape.kv_cache_bytes_per_token(engines.bytes_per_value)
