"""What a device does in a second, and what an hour of it costs. Nothing here was measured on a GPU."""

from dataclasses import dataclass, field
from math import inf

GIB = 2**30


@dataclass(frozen=True)
class Hardware:
    """One device among others of its kind: a GPU, or the threads of one process on a CPU."""

    name: str
    peak_flops_per_s: float
    """Dense bfloat16 operations per second. For a CPU: float32 matrix products, measured."""
    utilisation: float
    """The fraction of the peak that training reaches (MFU).

    For a CPU it is 1: `activation_bytes_per_s`, `kernel_s` and `attention_call_s` count what is not a matrix product.
    """
    memory_bytes: float
    memory_bytes_per_s: float
    link_bytes_per_s: float
    """Bytes per second to the other devices of a node, in one direction."""
    network_bytes_per_s: float
    """Bytes per second and device to other nodes, in one direction."""
    devices_per_node: int
    host_bytes_per_s: float
    """Bytes per second between the device and main memory."""
    price_per_hour: float
    """The price of one device in US dollars."""
    decode_utilisation: float = 1.0
    """The fraction of `memory_bytes_per_s` that decoding reaches."""
    engine_step_s: float = 0.0
    """Seconds that an engine's step costs beside arithmetic: scheduler, launches, Python."""
    engine_token_s: float = 0.0
    """Seconds that each token costs in addition: sampler, log-probabilities, output objects."""
    engine_completion_s: float = 0.0
    """Seconds that each completion costs once: its request, and its way back to the caller."""
    has_segments: bool = False
    """Whether packed rows are laid out in segments, as on CPUs.

    A reward model then computes its last layer at the scored tokens alone.
    """
    cache_block_tokens: int = 16
    """Tokens in one block of vLLM's cache: 16, or 128 on a CPU. Completions share the full blocks of their prompt."""
    activation_bytes_per_s: float = inf
    """Bytes per second that operators other than matrix products read and write. Infinite: part of `utilisation`."""
    reorder_bytes_per_s: float = inf
    """Bytes per second, read and written, at which a CPU engine packs a matrix into another order."""
    kernel_s: float = 0.0
    """Seconds that the call of an operator costs. 0: part of `utilisation`."""
    attention_call_s: tuple[float, float] = (0.0, 0.0)
    """Seconds of one operator call of those that attention makes for every text, its kernel included.

    The two values are for the forward and the backward pass. 0: part of `utilisation`.
    """
    update_s: float = 0.0
    """Seconds that new weights cost an engine beside their bytes: calls of actors, and its own bookkeeping."""
    probe_s: float = 0.0
    """Seconds until the new weights are confirmed, in addition."""
    overhead_bytes: float = field(default=0.0)
    """Bytes of the CUDA context, communication buffers and fragments."""

    def slowest_link_bytes_per_s(self, num_devices: int) -> float:
        """Return the bytes per second of the slowest link in a ring over `num_devices` devices."""
        return self.link_bytes_per_s if num_devices <= self.devices_per_node else self.network_bytes_per_s


TRAINING_UTILISATION = 0.35
"""The utilisation of GPUs in training, assumed.

Korthikanti et al. 2022, table 5, report 0.42 to 0.54 for tuned code on A100s; this is eager PyTorch. Replace the value
by the `throughput/utilisation` of a first run.
"""
DECODE_UTILISATION = 0.6
"""The utilisation of GPU memory in decoding, assumed."""
ENGINE_STEP_S = 2e-3
"""The `engine_step_s` of GPUs, assumed."""
OVERHEAD_BYTES = 2 * GIB
"""The `overhead_bytes` of GPUs, assumed."""
PRICES = "US dollars per GPU-hour; the defaults are assumed (November 2026, no quotation), so give your own"


def _gpu(
    name: str,
    peak_flops_per_s: float,
    memory_gib: int,
    memory_bytes_per_s: float,
    link_bytes_per_s: float,
    network_bytes_per_s: float,
    price_per_hour: float,
) -> Hardware:
    return Hardware(
        name,
        peak_flops_per_s,
        TRAINING_UTILISATION,
        memory_gib * GIB,
        memory_bytes_per_s,
        link_bytes_per_s,
        network_bytes_per_s,
        devices_per_node=8,
        host_bytes_per_s=25e9,  # PCIe 4 x16, about 80 % of 32 GB/s
        price_per_hour=price_per_hour,
        decode_utilisation=DECODE_UTILISATION,
        engine_step_s=ENGINE_STEP_S,
        overhead_bytes=OVERHEAD_BYTES,
    )


GPUS = {
    gpu.name: gpu
    for gpu in (
        _gpu("a100", 312e12, 80, 2.0e12, 300e9, 25e9, 1.8),
        _gpu("h100", 989e12, 80, 3.35e12, 450e9, 50e9, 3.0),
        _gpu("h200", 989e12, 141, 4.8e12, 450e9, 50e9, 3.8),
    )
}
"""The SXM variants by name, from NVIDIA's data sheets.

The NVLink rate is half of the figure for both directions. The network rate is one adapter of 200 or 400 Gb/s per GPU.
"""
