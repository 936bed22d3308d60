"""Volume and time of a weight update: trainer to engines (rloo/weight_sync.py), and what goes through Ray's object store beside it.

Weights never go through the object store: they are shared in memory, broadcast over gloo, or over NCCL.
"""

from dataclasses import dataclass

from research.scaling.generation import Engines, Sampling
from research.scaling.hardware import Hardware
from research.scaling.memory import FLOAT_BYTES
from research.scaling.shapes import ModelShape

CHECKSUM_PASSES, PACKING_PASSES = 2, 2
"""Over the weights of an engine beside the trainer (rloo/weight_sharing.py): a checksum at each end; and the engine's packing, which reads and writes."""
PROBE_PASSES = 2
"""A forward pass of trainer and engine each, at the same time from one memory."""
LOGPROB_BYTES = 9
"""A Python float in a pickle (BINFLOAT)."""


def pickled_id_bytes(vocab_size: int) -> int:
    """A token id in a pickle: BININT1, BININT2 or BININT."""
    return 2 if vocab_size <= 2**8 else 3 if vocab_size <= 2**16 else 5


@dataclass(frozen=True)
class WeightUpdate:
    """`num_bytes`: of one copy, float32, whatever the engines compute in. `loaded_s`: until every engine has the weights; `confirmed_s`: with the probe."""

    num_bytes: float
    gathered_bytes: float
    """What rank 0 receives of the other trainers' shards."""
    loaded_s: float
    confirmed_s: float


def shared_memory_update(shape: ModelShape, hardware: Hardware) -> WeightUpdate:
    """A whole policy (DDP) and one engine on the trainer's machine."""
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
    """A broadcast from trainer 0 to every engine device on other nodes, a pipelined chain: the slowest link carries each byte once. Never run here.

    A sharded policy is gathered on trainer 0 first, in its main memory (TrainEngine.full_state_dict).
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
    """Of one RLOO step: prompts to the engines, completions with their log-probabilities back, and both to the trainers. Small objects (Ray: below 100 kB)
    go inside the messages themselves; scores go over HTTP."""
    one_id = pickled_id_bytes(vocab_size)
    prompts = sampling.num_prompts * sampling.prompt_tokens * one_id
    completions = sampling.num_sampled * (one_id + LOGPROB_BYTES)
    return 3 * prompts + 2 * completions
