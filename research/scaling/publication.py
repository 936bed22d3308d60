"""Size and time of a weight update from trainer to engines (rm_robust/rloo/weights/), and the object store's traffic.

Weights never go through Ray's object store: they are shared in memory, or broadcast over gloo or NCCL.
"""

from dataclasses import dataclass

from research.scaling.generation import Engines, Sampling
from research.scaling.hardware import Hardware
from research.scaling.memory import FLOAT_BYTES
from research.scaling.shapes import ModelShape

CHECKSUM_PASSES, PACKING_PASSES = 2, 2
"""The passes over the weights of an engine beside the trainer (rm_robust/rloo/weights/shared_memory.py).

Each end computes one checksum. The engine's packing reads the weights once and writes them once.
"""
PROBE_PASSES = 2
"""The forward passes of a probe: one of the trainer and one of the engine, at the same time from one memory."""
LOGPROB_BYTES = 9
"""The bytes of a Python float in a pickle (BINFLOAT)."""


def pickled_id_bytes(vocab_size: int) -> int:
    """Return the bytes of a token id in a pickle (BININT1, BININT2 or BININT)."""
    return 2 if vocab_size <= 2**8 else 3 if vocab_size <= 2**16 else 5


@dataclass(frozen=True)
class WeightUpdate:
    """The size and time of one weight update."""

    num_bytes: float
    """Bytes of one copy in float32, whatever the engines compute in."""
    gathered_bytes: float
    """Bytes of the other trainers' shards that rank 0 receives."""
    loaded_s: float
    """Seconds until every engine has the weights."""
    confirmed_s: float
    """Seconds until the probe has confirmed the weights."""


def shared_memory_update(shape: ModelShape, hardware: Hardware) -> WeightUpdate:
    """Return the update of one engine on the trainer's machine. The trainer holds the whole policy (DDP)."""
    num_bytes = FLOAT_BYTES * shape.policy_parameters
    reading_s, packing_s = (
        CHECKSUM_PASSES * num_bytes / hardware.memory_bytes_per_s,
        PACKING_PASSES * num_bytes / hardware.reorder_bytes_per_s,
    )
    loaded_s = reading_s + packing_s + hardware.update_s
    read = FLOAT_BYTES * (shape.num_layers * shape.layer_parameters + shape.embedding_parameters)
    probe_s = PROBE_PASSES * read / hardware.memory_bytes_per_s + hardware.probe_s
    return WeightUpdate(num_bytes, 0, loaded_s, loaded_s + probe_s)


def nccl_update(
    shape: ModelShape, engines: Engines, hardware: Hardware, *, num_trainers: int, is_sharded: bool
) -> WeightUpdate:
    """Return the update by a broadcast from trainer 0 to every engine device on other nodes. This was never run here.

    The broadcast is a pipelined chain: the slowest link carries each byte once. A sharded policy is gathered on trainer
    0 first, in its main memory (TrainEngine.full_state_dict).
    """
    num_bytes = FLOAT_BYTES * shape.policy_parameters
    gathered = num_bytes * (num_trainers - 1) / num_trainers if is_sharded else 0
    gather_s = gathered / hardware.slowest_link_bytes_per_s(num_trainers) + (
        2 * num_bytes / hardware.host_bytes_per_s if is_sharded else 0
    )
    written = num_bytes + engines.bytes_per_value * shape.policy_parameters / engines.num_devices_each
    loaded_s = (
        gather_s + num_bytes / hardware.network_bytes_per_s + written / hardware.memory_bytes_per_s + hardware.update_s
    )
    read = FLOAT_BYTES * shape.policy_parameters
    return WeightUpdate(
        num_bytes, gathered, loaded_s, loaded_s + PROBE_PASSES * read / hardware.memory_bytes_per_s + hardware.probe_s
    )


def object_store_bytes(sampling: Sampling, vocab_size: int) -> float:
    """Return the bytes that one RLOO step sends through Ray's object store.

    Prompts go to the engines, completions come back with their log-probabilities, and both go to the trainers. Ray
    sends objects below 100 kB inside the messages themselves. Scores go over HTTP.
    """
    one_id = pickled_id_bytes(vocab_size)
    prompts = sampling.num_prompts * sampling.prompt_tokens * one_id
    completions = sampling.num_sampled * (one_id + LOGPROB_BYTES)
    return 3 * prompts + 2 * completions
