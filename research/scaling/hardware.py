"""What a device does in a second, and what an hour of it costs: data. Nothing of a GPU was measured here."""

from dataclasses import dataclass, field
from math import inf

GIB = 2**30


@dataclass(frozen=True)
class Hardware:
    """One device (a GPU, or the threads of one process on a CPU) among its like."""

    name: str
    peak_flops_per_s: float
    """bfloat16, dense. A CPU's: float32 matrix products, measured."""
    utilisation: float
    """Of the peak, in training (MFU). A CPU's is 1: what is not matrix products has its own terms, the next two."""
    memory_bytes: float
    memory_bytes_per_s: float
    link_bytes_per_s: float
    """One direction, to the other devices of a node."""
    network_bytes_per_s: float
    """One direction and device, to other nodes."""
    devices_per_node: int
    host_bytes_per_s: float
    """Between the device and main memory."""
    price_per_hour: float
    """US dollars a device."""
    decode_utilisation: float = 1.0
    """Of the memory's bytes a second, while decoding."""
    engine_step_s: float = 0.0
    """What an engine's step costs beside arithmetic: scheduler, launches, Python."""
    engine_token_s: float = 0.0
    """And each of its tokens: sampler, log-probabilities, output objects."""
    engine_completion_s: float = 0.0
    """And each completion once: its request, and its way to who asked."""
    has_segments: bool = False
    """Packed rows are laid out in segments, as on CPUs: a reward model computes its last layer at the scored tokens alone."""
    cache_block_tokens: int = 16
    """vLLM's: what a prompt's completions share of it, in whole blocks (128 on a CPU)."""
    activation_bytes_per_s: float = inf
    """At which operators beside matrix products read and write. Infinite: it is part of `utilisation`."""
    reorder_bytes_per_s: float = inf
    """At which a CPU engine packs a matrix into another order, read and written."""
    kernel_s: float = 0.0
    """What calling an operator costs. 0: likewise."""
    attention_call_s: tuple[float, float] = (0.0, 0.0)
    """What one costs of those that attention calls for every text, its kernel among them, forward and backward. 0: likewise."""
    update_s: float = 0.0
    """What loading new weights costs an engine beside their bytes: calls of actors, its own bookkeeping."""
    probe_s: float = 0.0
    """And confirming them."""
    overhead_bytes: float = field(default=0.0)
    """CUDA context, communication buffers, fragments."""

    def slowest_link_bytes_per_s(self, num_devices: int) -> float:
        """Of a ring over so many."""
        return self.link_bytes_per_s if num_devices <= self.devices_per_node else self.network_bytes_per_s


TRAINING_UTILISATION = 0.35
"""Assumed. Korthikanti et al. 2022, table 5, report 0.42 to 0.54 of tuned code on A100s; this is eager PyTorch. Replace it by a first run's
`throughput/utilisation`."""
DECODE_UTILISATION = 0.6
"""Assumed."""
ENGINE_STEP_S = 2e-3
"""Assumed."""
OVERHEAD_BYTES = 2 * GIB
"""Assumed."""
PRICES = "US dollars a GPU and hour, assumed in November 2026 from no quotation; give your own with --price"


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
"""SXM, by NVIDIA's data sheets (NVLink: half of the figure for both directions). Network: a 200 or 400 Gb/s adapter a GPU."""
