"""Memory and time of reward-model training on GPUs, from a formula: computed, not measured. docs/RECIPES.md explains it and holds the table.

    python -m rm_robust.estimates

Shapes: P parameters, L layers, H hidden, N GPUs, T tokens of a micro-batch on one GPU.
"""

from dataclasses import dataclass

GIB = 2**30
BYTES_PER_PARAMETER = 16
"""float32 weight, gradient and AdamW's two moments."""
GATHERED_LAYERS = 2
"""FSDP2 holds the layer at work and fetches the next, in float32, and as much again as gradients in the backward pass."""
KEPT_BYTES_PER_HIDDEN = 4
"""Checkpointing keeps a layer's float32 input."""
WORKING_BYTES_PER_HIDDEN = 60
"""What one layer computes again in its backward pass, per token and hidden unit, bfloat16: queries to outputs, and a feed-forward about 3.5 H wide."""
OVERHEAD_BYTES = 2 * GIB
"""CUDA context, communication buffers, fragments."""
FLOPS_PER_PARAMETER_AND_TOKEN = 8
"""6 for forward and backward (Kaplan et al. 2020, section 2.1), and 2 for computing activations again."""
UTILISATION = 0.35
"""Of the peak: an assumption, to be replaced by `throughput/utilisation` of a first run."""
PEAK_FLOPS = 312e12
"""A100, bfloat16, dense."""
NUM_GPUS = (1, 2, 4, 8)


@dataclass(frozen=True)
class Workload:
    """One model on one data set. `tokens_per_pair`: prompt once and both completions, an assumption until the preferences stage has counted them."""

    recipe: str
    num_parameters: float
    num_embedded: float
    """Of them in the embedding table, which is looked up and not multiplied."""
    num_layers: int
    hidden_size: int
    num_pairs: int
    tokens_per_pair: int = 900
    micro_batch_tokens: int = 8192


WORKLOADS = (
    Workload("part1_llama_1b", 1.24e9, 0.26e9, 16, 2048, 51_200),
    Workload("part1_llama_3b", 3.21e9, 0.39e9, 28, 3072, 51_200),
    Workload("part1_qwen_1.5b", 1.54e9, 0.23e9, 28, 1536, 51_200),
    Workload("part1_qwen_3b", 3.09e9, 0.31e9, 36, 2048, 51_200),
    Workload("part3_reward_model", 7.50e9, 0.53e9, 32, 4096, 80_000, tokens_per_pair=1_400),
)


def memory_gib(work: Workload, num_gpus: int) -> float:
    """Peak of one GPU: shards of the states, gathered layers, activations, overhead (GiB)."""
    states = BYTES_PER_PARAMETER * work.num_parameters / num_gpus
    gathered = GATHERED_LAYERS * 2 * 4 * work.num_parameters / work.num_layers if num_gpus > 1 else 0
    kept = KEPT_BYTES_PER_HIDDEN * work.micro_batch_tokens * work.hidden_size * work.num_layers
    working = WORKING_BYTES_PER_HIDDEN * work.micro_batch_tokens * work.hidden_size
    return (states + gathered + kept + working + OVERHEAD_BYTES) / GIB


def epoch_hours(work: Workload, num_gpus: int) -> float:
    """One pass over the pairs (hours)."""
    flops = FLOPS_PER_PARAMETER_AND_TOKEN * (work.num_parameters - work.num_embedded) * work.num_pairs * work.tokens_per_pair
    return flops / (num_gpus * PEAK_FLOPS * UTILISATION) / 3600


def table() -> str:
    """Markdown: GiB a GPU and hours an epoch, by number of GPUs."""
    lines = ["| recipe | " + " | ".join(f"{n} GPU{'s' if n > 1 else ''}" for n in NUM_GPUS) + " |", "| --- " * (1 + len(NUM_GPUS)) + "|"]
    for work in WORKLOADS:
        cells = [f"{memory_gib(work, n):.0f} GiB, {epoch_hours(work, n):.1f} h" for n in NUM_GPUS]
        lines.append(f"| {work.recipe} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
