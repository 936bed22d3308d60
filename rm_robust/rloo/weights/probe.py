"""The probe: a fixed text that shows whether an engine computes with the weights whose bytes it has received.

The checksums of an update do not show what an engine does with the bytes: on CPU, vLLM's tied output heads keep an old
packed copy unless they are packed again (vllm_loader.py). The probe does not detect a difference below the engine's
tolerance until further updates have added to it.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from rm_robust.data.records import TokenGroup
from rm_robust.models.packing import PackedBatch, completion_logits, lay_out, token_logprobs
from rm_robust.models.policy import PackedPolicy

NUM_PROBE_TOKENS = 8
"""Number of tokens in the probe."""


@dataclass(frozen=True)
class Probe:
    """The token ids of the probe, and a function that computes the trainer's log-probabilities of all but the first.

    `trainer_logprobs` uses the trainer's current weights, in float32 at temperature 1; its unit is nats.
    """

    token_ids: list[int]
    trainer_logprobs: Callable[[], list[float]]


def spread_token_ids(vocabulary_size: int) -> list[int]:
    """Return NUM_PROBE_TOKENS ids, spread evenly over the vocabulary.

    This needs no tokenizer, and it reads rows from all parts of the embedding.
    """
    return [index * vocabulary_size // NUM_PROBE_TOKENS for index in range(NUM_PROBE_TOKENS)]


def probe_token_ids(policy: PackedPolicy) -> list[int]:
    """Return the token ids of the policy's probe."""
    return spread_token_ids(policy.model.config.vocab_size)


def probe_batch(policy: PackedPolicy) -> PackedBatch:
    """Return the batch with the probe's first token as prompt and the others as its completion."""
    first_id, *other_ids = probe_token_ids(policy)
    return lay_out([TokenGroup([first_id], [other_ids])], policy.layout, pad_id=first_id)


def policy_probe(policy: PackedPolicy) -> Probe:
    """Return the probe of a policy that is whole in this process, neither sharded nor wrapped.

    Its forward pass is plain float32, whatever precision training uses.
    """
    batch = probe_batch(policy)

    @torch.no_grad()
    def trainer_logprobs() -> list[float]:
        device_batch = batch.to(policy.model.device)
        logits_MV = completion_logits(policy.model, device_batch)
        logprobs_M, _ = token_logprobs(logits_MV, device_batch.target_ids_M, temperature=1.0)
        values: list[float] = logprobs_M.tolist()
        return values

    return Probe(probe_token_ids(policy), trainer_logprobs)
