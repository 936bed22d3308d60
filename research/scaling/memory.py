"""Peak memory of one trainer's device, by strategy, for the engines of this repository (train_engine.py, fsdp_engine.py, deepspeed_engine.py).

Shapes: P parameters, Pt of them trained, L layers, H hidden, I feed-forward, V vocabulary, N devices, T tokens of a micro-batch, M of them predicted.
Weights, gradients and optimiser state are float32 in every case (config_parts.ComputeConfig).
"""

from dataclasses import dataclass

from research.scaling.shapes import ModelShape
from rm_robust.config.shared import ComputeConfig, StrategyConfig

FLOAT_BYTES = 4
MOMENTS = 2
"""AdamW."""
SAVED_BYTES_FLOAT32 = (44, 16, 8)
SAVED_BYTES_BFLOAT16 = (36, 8, 8)
"""What one layer keeps of a token for its backward pass: bytes by H, by I, and by head. Counted on transformers 5.19's Qwen2 with our packed attention,
each storage once (tests/unit/research/scaling/test_memory.py counts again). Korthikanti et al. 2022, equation 2, have 34 H for GPT's layer in float16."""
LAST_SAVED_BYTES_FLOAT32, LAST_SAVED_BYTES_BFLOAT16 = 20, 16
"""By H, of the last layer where it is computed at the scored tokens alone (reward_model/last_layer.py): a token's norm, key and value. Counted there too."""
CAST_BYTES = 2
"""Autocast's bfloat16 copy of a weight. torch keeps those of a forward pass until it ends, under FSDP2 too, where the weights they were made of are gone by
then: so every rank holds a copy of the whole model (seen on CPU; ZeRO-3: assumed)."""
LOGIT_BYTES = 16
"""Of a predicted token and vocabulary entry at the height of packing.token_logprobs: logits, their log-softmax, its exponential and the product."""
WORKING_VALUES = (4, 2)
"""Gradients at work in the layer whose backward pass runs, float32, by H and by I: an estimate."""
GATHERED_LAYERS = 2
"""FSDP2 holds the layer at work and fetches the next, and as much again as gradients in the backward pass."""
DEEPSPEED_BUCKET_PARAMETERS = 500_000_000
"""reduce_bucket_size, DeepSpeed's default: a buffer of the size, whatever the model's."""
DEEPSPEED_LIVE_PARAMETERS = 1_000_000_000
"""stage3_max_live_parameters, DeepSpeed's default: gathered weights that ZeRO-3 keeps."""


@dataclass(frozen=True)
class TrainerMemory:
    """Bytes of one device; `peak_bytes` is the largest of what loading, a forward, a backward pass and an update need."""

    weight_bytes: float
    gradient_bytes: float
    optimizer_bytes: float
    gathered_bytes: float
    """Whole weights and gradients that a sharded layer's passes need, and communication buffers."""
    reference_bytes: float
    """RLOO's frozen reference: whole on every trainer, whatever the strategy."""
    kept_bytes: float
    """Activations between the passes."""
    layer_bytes: float
    """At work in the backward pass."""
    cast_bytes: float
    logit_bytes: float
    update_bytes: float
    """AdamW's temporary value of each weight (torch's `foreach` form, its default on GPUs)."""
    loading_bytes: float
    """The whole model in float32: the engines move it to the device before they shard it."""
    overhead_bytes: float

    @property
    def state_bytes(self) -> float:
        return self.weight_bytes + self.gradient_bytes + self.optimizer_bytes + self.reference_bytes

    @property
    def training_bytes(self) -> float:
        """Without the height of loading."""
        passes = self.kept_bytes + max(self.cast_bytes, self.layer_bytes) + self.logit_bytes + self.gathered_bytes
        return self.state_bytes + max(passes, self.update_bytes) + self.overhead_bytes

    @property
    def peak_bytes(self) -> float:
        return max(self.training_bytes, self.loading_bytes + self.overhead_bytes)


@dataclass(frozen=True)
class MicroBatch:
    """One trainer's."""

    num_tokens: float
    num_predicted: float = 0
    """Tokens whose logits are computed: a policy's completions, none of a reward model's."""
    num_scored: float | None = None
    """Tokens at which the last layer is computed whole, and the others' keys and values alone. None: at all."""


@dataclass(frozen=True)
class Trained:
    """What is trained: a policy or a reward model."""

    shape: ModelShape
    num_parameters: int
    num_trained: int
    """Fewer with adapters."""
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
    """States: Rajbhandari et al. 2020 (ZeRO), section 3.1 and figure 1, with 4 bytes a weight and gradient and 8 of AdamW's moments."""
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
    """Activations that one layer keeps of a token when nothing is computed again."""
    by_hidden, by_feed_forward, by_head = (
        SAVED_BYTES_BFLOAT16 if compute.precision == "bfloat16" else SAVED_BYTES_FLOAT32
    )
    return by_hidden * shape.hidden_size + by_feed_forward * shape.intermediate_size + by_head * shape.num_heads


def last_layer_saved_bytes(shape: ModelShape, compute: ComputeConfig, batch: MicroBatch) -> float:
    """Of all the micro-batch's tokens."""
    of_token = saved_bytes_per_token_and_layer(shape, compute)
    if batch.num_scored is None:
        return of_token * batch.num_tokens
    by_hidden = LAST_SAVED_BYTES_BFLOAT16 if compute.precision == "bfloat16" else LAST_SAVED_BYTES_FLOAT32
    return by_hidden * shape.hidden_size * batch.num_tokens + of_token * batch.num_scored


def _states(trained: Trained, strategy: StrategyConfig, num_devices: int) -> tuple[float, float, float, float]:
    """Weights, gradients, moments and what is gathered (bytes of one device)."""
    weights, gradients = FLOAT_BYTES * trained.num_parameters, FLOAT_BYTES * trained.num_trained
    moments = MOMENTS * gradients
    if strategy.kind == "ddp":
        buckets = gradients if num_devices > 1 else 0  # DistributedDataParallel's, gradient_as_bucket_view = False
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
    master_and_moments = (
        0 if strategy.cpu_offload else (gradients + moments) / num_devices
    )  # DeepSpeed keeps a float32 copy of float32 weights too
    if strategy.zero_stage == 1:
        return weights, gradients, master_and_moments, bucket
    if strategy.zero_stage == 2:
        return weights, gradients / num_devices, master_and_moments, bucket
    live = min(weights, FLOAT_BYTES * DEEPSPEED_LIVE_PARAMETERS)
    return weights / num_devices, gradients / num_devices, master_and_moments, bucket + live
