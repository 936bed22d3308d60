"""Peak memory of one trainer's device, by strategy, for the engines of this repository (rm_robust/training/engines/).

Sizes: P parameters, Pt of them trained, L layers, H hidden, I feed-forward, V vocabulary, N devices, T tokens of a
micro-batch, M of them predicted. Weights, gradients and optimiser state are float32 in every case (ComputeConfig in
rm_robust/config/shared.py).
"""

from dataclasses import dataclass

from research.scaling.shapes import ModelShape
from rm_robust.config.shared import ComputeConfig, StrategyConfig

FLOAT_BYTES = 4
MOMENTS = 2
"""The moments that AdamW keeps of each trained weight."""
SAVED_BYTES_FLOAT32 = (44, 16, 8)
SAVED_BYTES_BFLOAT16 = (36, 8, 8)
"""The bytes that one layer keeps of a token for its backward pass, per unit of H, per unit of I, and per head.

They were counted on the Qwen2 of transformers 5.19 with our packed attention, each storage once, and
tests/unit/research/scaling/test_memory.py counts them again. Korthikanti et al. 2022, equation 2, have 34 H for GPT's
layer in float16.
"""
LAST_SAVED_BYTES_FLOAT32, LAST_SAVED_BYTES_BFLOAT16 = 20, 16
"""The bytes per unit of H that the last layer keeps of a token: the token's norm, key and value.

This holds where the last layer is computed at the scored tokens alone (rm_robust/models/last_layer.py). The same test
counts them.
"""
CAST_BYTES = 2
"""The bytes of autocast's bfloat16 copy of a weight.

torch keeps all copies of a forward pass until it ends. FSDP2 has freed the weights themselves by then, but the copies
stay, so every rank holds a copy of the whole model (observed on CPU, assumed for ZeRO-3).
"""
LOGIT_BYTES = 16
"""The bytes per predicted token and vocabulary entry at the peak of token_logprobs (rm_robust/models/packing.py).

They hold the logits, their log-softmax, its exponential and the product.
"""
WORKING_VALUES = (4, 2)
"""The float32 gradients in use in the layer whose backward pass runs, per unit of H and of I. This is an estimate."""
GATHERED_LAYERS = 2
"""The layers that FSDP2 gathers at the same time: the one that is computed, and the next one.

The backward pass holds as much again for gradients.
"""
DEEPSPEED_BUCKET_PARAMETERS = 500_000_000
"""DeepSpeed's default of reduce_bucket_size: its buffer has this size, whatever the model's size."""
DEEPSPEED_LIVE_PARAMETERS = 1_000_000_000
"""DeepSpeed's default of stage3_max_live_parameters: the gathered weights that ZeRO-3 keeps."""


@dataclass(frozen=True)
class TrainerMemory:
    """The bytes of one device.

    `peak_bytes` is the largest of what loading, a forward pass, a backward pass and an update need.
    """

    weight_bytes: float
    gradient_bytes: float
    optimizer_bytes: float
    gathered_bytes: float
    """Bytes of the whole weights and gradients that a sharded layer's passes need, and of communication buffers."""
    reference_bytes: float
    """Bytes of RLOO's frozen reference, which every trainer holds whole with any strategy."""
    kept_bytes: float
    """Bytes of the activations that are kept between the passes."""
    layer_bytes: float
    """Bytes in use in the backward pass of one layer."""
    cast_bytes: float
    logit_bytes: float
    update_bytes: float
    """Bytes of AdamW's temporary value of each weight (torch's `foreach` form, its default on GPUs)."""
    loading_bytes: float
    """Bytes of the whole model in float32: the engines move it to the device before they shard it."""
    overhead_bytes: float

    @property
    def state_bytes(self) -> float:
        return self.weight_bytes + self.gradient_bytes + self.optimizer_bytes + self.reference_bytes

    @property
    def training_bytes(self) -> float:
        """The peak of training, without that of loading."""
        passes = self.kept_bytes + max(self.cast_bytes, self.layer_bytes) + self.logit_bytes + self.gathered_bytes
        return self.state_bytes + max(passes, self.update_bytes) + self.overhead_bytes

    @property
    def peak_bytes(self) -> float:
        return max(self.training_bytes, self.loading_bytes + self.overhead_bytes)


@dataclass(frozen=True)
class MicroBatch:
    """One trainer's micro-batch."""

    num_tokens: float
    num_predicted: float = 0
    """Tokens whose logits are computed: those of a policy's completions, and none of a reward model's."""
    num_scored: float | None = None
    """Tokens at which the whole last layer is computed; other tokens get keys and values alone. None: all tokens."""


@dataclass(frozen=True)
class Trained:
    """A policy or a reward model that is trained."""

    shape: ModelShape
    num_parameters: int
    num_trained: int
    """Trained parameters. With adapters these are fewer than `num_parameters`."""
    has_reference: bool = False


def trainer_memory(
    trained: Trained,
    batch: MicroBatch,
    *,
    strategy: StrategyConfig,
    compute: ComputeConfig,
    num_devices: int,
    overhead_bytes: float,
) -> TrainerMemory:
    """Return the memory of one device.

    The states follow Rajbhandari et al. 2020 (ZeRO), section 3.1 and figure 1, with 4 bytes for a weight, 4 for its
    gradient and 8 for AdamW's moments.
    """
    shape = trained.shape
    weights, gradients, optimizer, gathered = _states(trained, strategy, num_devices)
    all_weights = FLOAT_BYTES * trained.num_parameters
    casts = CAST_BYTES * (trained.num_parameters - shape.embedding_parameters) if compute.precision == "bfloat16" else 0
    saved, last = (
        saved_bytes_per_token_and_layer(shape, compute) * batch.num_tokens,
        last_layer_saved_bytes(shape, compute, batch),
    )
    of_hidden, of_feed_forward = WORKING_VALUES
    working = (
        FLOAT_BYTES * (of_hidden * shape.hidden_size + of_feed_forward * shape.intermediate_size) * batch.num_tokens
    )
    kept, layer = saved * (shape.num_layers - 1) + last + casts, working
    if compute.gradient_checkpointing:
        kept, layer = FLOAT_BYTES * shape.hidden_size * batch.num_tokens * shape.num_layers, saved + working
    is_gathered_on_load = not (strategy.kind == "fsdp2" and strategy.cpu_offload)
    return TrainerMemory(
        weight_bytes=weights,
        gradient_bytes=gradients,
        optimizer_bytes=optimizer,
        gathered_bytes=gathered,
        reference_bytes=all_weights if trained.has_reference else 0,
        kept_bytes=kept,
        layer_bytes=layer,
        cast_bytes=casts if compute.gradient_checkpointing else 0,
        logit_bytes=LOGIT_BYTES * batch.num_predicted * shape.vocab_size,
        update_bytes=FLOAT_BYTES * trained.num_trained / (1 if strategy.kind == "ddp" else num_devices),
        loading_bytes=(all_weights if is_gathered_on_load else 0) + (all_weights if trained.has_reference else 0),
        overhead_bytes=overhead_bytes,
    )


def saved_bytes_per_token_and_layer(shape: ModelShape, compute: ComputeConfig) -> float:
    """Return the bytes of activations that one layer keeps of a token if nothing is computed again."""
    by_hidden, by_feed_forward, by_head = (
        SAVED_BYTES_BFLOAT16 if compute.precision == "bfloat16" else SAVED_BYTES_FLOAT32
    )
    return by_hidden * shape.hidden_size + by_feed_forward * shape.intermediate_size + by_head * shape.num_heads


def last_layer_saved_bytes(shape: ModelShape, compute: ComputeConfig, batch: MicroBatch) -> float:
    """Return the bytes of activations that the last layer keeps of the whole micro-batch."""
    bytes_per_token = saved_bytes_per_token_and_layer(shape, compute)
    if batch.num_scored is None:
        return bytes_per_token * batch.num_tokens
    by_hidden = LAST_SAVED_BYTES_BFLOAT16 if compute.precision == "bfloat16" else LAST_SAVED_BYTES_FLOAT32
    return by_hidden * shape.hidden_size * batch.num_tokens + bytes_per_token * batch.num_scored


def _states(trained: Trained, strategy: StrategyConfig, num_devices: int) -> tuple[float, float, float, float]:
    """Return the bytes of one device's weights, gradients, moments and gathered values."""
    weights, gradients = FLOAT_BYTES * trained.num_parameters, FLOAT_BYTES * trained.num_trained
    moments = MOMENTS * gradients
    if strategy.kind == "ddp":
        # DistributedDataParallel has buckets of its own, because gradient_as_bucket_view is False.
        buckets = gradients if num_devices > 1 else 0
        return weights, gradients, moments, buckets
    if strategy.kind == "fsdp2":
        layer, outside = (
            FLOAT_BYTES * trained.shape.layer_parameters,
            weights - FLOAT_BYTES * trained.shape.num_layers * trained.shape.layer_parameters,
        )
        gathered = 2 * (GATHERED_LAYERS * layer + outside) if num_devices > 1 else 0
        shards = (weights / num_devices, gradients / num_devices, moments / num_devices)
        return (0, 0, 0, gathered) if strategy.cpu_offload else (*shards, gathered)
    bucket = FLOAT_BYTES * DEEPSPEED_BUCKET_PARAMETERS
    # DeepSpeed keeps a float32 copy of float32 weights too.
    master_and_moments = 0 if strategy.cpu_offload else (gradients + moments) / num_devices
    if strategy.zero_stage == 1:
        return weights, gradients, master_and_moments, bucket
    if strategy.zero_stage == 2:
        return weights, gradients / num_devices, master_and_moments, bucket
    live = min(weights, FLOAT_BYTES * DEEPSPEED_LIVE_PARAMETERS)
    return weights / num_devices, gradients / num_devices, master_and_moments, bucket + live
