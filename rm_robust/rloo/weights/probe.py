"""A fixed text by which an engine shows that it computes with the trainer's weights, not only that it received their bytes.

The checksums of an update do not see what an engine makes of the bytes: vLLM's tied output heads on CPU keep an old packed copy unless they are
packed again (vllm_weight_loader.py). A difference below the engine's tolerance is not seen either, until further updates have added to it.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from rm_robust.data.records import TokenGroup
from rm_robust.models.packing import PackedBatch, hidden_states, lay_out, token_logprobs
from rm_robust.models.policy import PackedPolicy

NUM_PROBE_TOKENS = 8


@dataclass(frozen=True)
class Probe:
    """Token ids, and the trainer's own log-probabilities (nats, temperature 1, float32) of those after the first, under its weights of the moment."""

    token_ids: list[int]
    trainer_logprobs: Callable[[], list[float]]


def spread_token_ids(vocabulary_size: int) -> list[int]:
    """NUM_PROBE_TOKENS ids, evenly over the vocabulary: no tokenizer is needed, and rows of the whole embedding are read."""
    return [index * vocabulary_size // NUM_PROBE_TOKENS for index in range(NUM_PROBE_TOKENS)]


def probe_token_ids(policy: PackedPolicy) -> list[int]:
    return spread_token_ids(policy.model.config.vocab_size)


def probe_batch(policy: PackedPolicy) -> PackedBatch:
    """The first of the probe's tokens as prompt, the others as its completion."""
    first_id, *other_ids = probe_token_ids(policy)
    return lay_out([TokenGroup([first_id], [other_ids])], policy.layout, pad_id=first_id)


def policy_probe(policy: PackedPolicy) -> Probe:
    """The probe of a policy in this process: whole, neither sharded nor wrapped. Its forward pass is plain float32, whatever training computes with."""
    batch = probe_batch(policy)

    @torch.no_grad()
    def trainer_logprobs() -> list[float]:
        own_batch = batch.to(policy.model.device)
        hidden_TH = hidden_states(policy.model.base_model, own_batch)
        logprobs_M, _ = token_logprobs(policy.model.get_output_embeddings(), hidden_TH, own_batch, temperature=1.0)
        values: list[float] = logprobs_M.tolist()
        return values

    return Probe(probe_token_ids(policy), trainer_logprobs)
