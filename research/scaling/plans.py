"""Compute memory, time and traffic of a config's reward-model, SFT and RLOO stages on given hardware.

A config does not say how long its texts are, so the caller gives their lengths. Every figure is for one device unless
it says otherwise.
"""

import math
from dataclasses import dataclass, replace

from research.scaling.generation import Engines, Sampling, generation_seconds
from research.scaling.hardware import Hardware
from research.scaling.memory import MicroBatch, Trained, TrainerMemory, trainer_memory
from research.scaling.publication import WeightUpdate, nccl_update, object_store_bytes
from research.scaling.shapes import ModelShape, shape_named, shape_of_config
from research.scaling.training import (
    Passes,
    Tokens,
    compute_seconds,
    forward_flops,
    passes_of_step,
    sent_bytes,
    step_flops,
    step_seconds,
)
from rm_robust.config.objectives import Objective
from rm_robust.config.rloo import RlooConfig
from rm_robust.config.run import PipelineConfig
from rm_robust.config.training import LoraConfig, RewardModelConfig, SftConfig

BATCH_COUPLED = (Objective.BATCH_SUM_TO_ZERO, Objective.CENTERING)
"""The objectives that couple the pairs of a batch: all except SUMS_OVER_PAIRS.

SUMS_OVER_PAIRS is not imported, because its module (rm_robust/training/reward_model/losses.py) imports torch.
"""
DTYPE_BYTES = {"float32": 4, "bfloat16": 2}
FROZEN_BACKWARD = 0.5
"""The fraction of a backward pass that frozen weights need, because they have no gradients of their own.

Kaplan's 4 operations per weight and token become 2. The adapters' own arithmetic is left out.
"""


@dataclass(frozen=True)
class Lengths:
    """Mean tokens of a prompt and of a completion."""

    prompt_tokens: float
    completion_tokens: float

    def group_tokens(self, num_completions: int) -> float:
        """Return the tokens of one prompt, counted once, and of its completions."""
        return self.prompt_tokens + num_completions * self.completion_tokens

    def visible(self, num_completions: int) -> float:
        """Return the mean number of tokens that a token of such a group attends to, if all lengths equal the mean."""
        prompts = self.prompt_tokens * self.prompt_tokens / 2
        completions = num_completions * self.completion_tokens * (self.prompt_tokens + self.completion_tokens / 2)
        return (prompts + completions) / self.group_tokens(num_completions)


@dataclass(frozen=True)
class TrainingPlan:
    """A training stage on `num_devices` devices."""

    num_devices: int
    groups_per_step: int
    """Pairs or demonstrations of all devices together."""
    tokens_per_step: float
    flops: float
    """Operations of one device in one step."""
    memory: TrainerMemory
    compute_s: float
    communication_s: float
    step_s: float
    sent_bytes: float

    @property
    def tokens_per_s(self) -> float:
        """Tokens per second of all devices together. A prompt counts once."""
        return self.tokens_per_step / self.step_s

    def device_hours(self, num_groups: float) -> float:
        """Return the hours of all devices together for one pass over `num_groups` groups."""
        return num_groups / self.groups_per_step * self.step_s * self.num_devices / 3600


@dataclass(frozen=True)
class RlooPlan:
    """One RLOO step, one part after the other."""

    generate_s: float
    measure_s: float
    update_s: float
    score_device_s: float
    """Seconds of scoring if one device did all of it. Serving spends them while other completions are sampled."""
    memory: TrainerMemory
    weight_update: WeightUpdate
    object_store_bytes: float
    engines: Engines
    num_trainers: int

    @property
    def engine_devices_per_trainer(self) -> float:
        """The engine devices per trainer with which generation takes as long as training.

        `max_policy_lag = 1` then hides one behind the other. Both are scaled as if they could be split evenly.
        """
        return self.generate_s * self.engines.num_devices / ((self.measure_s + self.update_s) * self.num_trainers)


def policy_shape(config: PipelineConfig, *, vocab_size: int | None = None) -> ModelShape:
    """Return the shape of the config's policy. Raises ConfigError if the sizes of model.path are not known."""
    return (
        shape_of_config(config.model, vocab_size=vocab_size)
        if config.model.path is None
        else shape_named(config.model.path)
    )


def reward_model_shape(config: PipelineConfig, *, vocab_size: int | None = None) -> ModelShape:
    """Return the shape of the reward model's base model. Raises ConfigError if its sizes are not known."""
    base = config.reward_model.base_path
    return policy_shape(config, vocab_size=vocab_size) if base is None else shape_named(base)


def adapter_parameters(shape: ModelShape, lora: LoraConfig) -> int:
    """Return the parameters of the adapters and the score head.

    An adapted matrix needs rank x (in + out) parameters (Hu et al. 2021, section 4.1).
    """
    hidden, query, kv, wide = shape.hidden_size, shape.query_width, shape.kv_width, shape.intermediate_size
    widths = {"q_proj": hidden + query, "k_proj": hidden + kv, "v_proj": hidden + kv, "o_proj": query + hidden}
    widths |= dict.fromkeys(("gate_proj", "up_proj", "down_proj"), hidden + wide)
    names = widths if lora.target_modules == "all-linear" else lora.target_modules
    return shape.num_layers * lora.rank * sum(widths[name] for name in names) + hidden


def reward_model_plan(
    settings: RewardModelConfig,
    shape: ModelShape,
    lengths: Lengths,
    hardware: Hardware,
    *,
    num_devices: int | None = None,
) -> TrainingPlan:
    """Return the plan of the reward-model stage.

    `num_devices` replaces the config's number of devices; the pairs per step stay the same.
    """
    trained = Trained(shape, shape.reward_model_parameters, shape.reward_model_parameters)
    if settings.lora is not None:
        adapters = adapter_parameters(shape, settings.lora)
        trained = Trained(shape, shape.reward_model_parameters + adapters - shape.hidden_size, adapters)
    return _training_plan(
        settings, trained, lengths, hardware, num_completions=2, is_policy=False, num_devices=num_devices
    )


def sft_plan(
    settings: SftConfig, shape: ModelShape, lengths: Lengths, hardware: Hardware, *, num_devices: int | None = None
) -> TrainingPlan:
    trained = Trained(shape, shape.policy_parameters, shape.policy_parameters)
    return _training_plan(
        settings, trained, lengths, hardware, num_completions=1, is_policy=True, num_devices=num_devices
    )


def _training_plan(
    settings: RewardModelConfig | SftConfig,
    trained: Trained,
    lengths: Lengths,
    hardware: Hardware,
    *,
    num_completions: int,
    is_policy: bool,
    num_devices: int | None,
) -> TrainingPlan:
    devices = num_devices or settings.workers.num_workers
    tokens_per_step = settings.batch_size * lengths.group_tokens(num_completions)
    max_tokens = settings.max_tokens_per_micro_batch
    tokens = _tokens(
        lengths, settings.batch_size / devices, num_completions, is_policy=is_policy, max_tokens=max_tokens
    )
    if hardware.has_segments and not is_policy:
        tokens = replace(tokens, num_scored=tokens.num_groups * num_completions)
    is_coupled = isinstance(settings, RewardModelConfig) and settings.objective in BATCH_COUPLED
    passes = passes_of_step(settings.compute, is_batch_coupled=is_coupled, num_micro_batches=tokens.num_micro_batches)
    if trained.num_trained < trained.num_parameters:
        passes = Passes(passes.num_forward, passes.num_backward * FROZEN_BACKWARD)
    compute_s = compute_seconds(trained, tokens, passes, hardware)
    first_passes = 1 if is_coupled and tokens.num_micro_batches > 1 else 0
    sent = sent_bytes(
        trained,
        settings.strategy,
        num_devices=devices,
        num_micro_batches=tokens.num_micro_batches,
        num_first_passes=first_passes,
    )
    communication_s = sent / hardware.slowest_link_bytes_per_s(devices)
    memory = trainer_memory(
        trained,
        _largest_micro_batch(tokens, max_tokens),
        strategy=settings.strategy,
        compute=settings.compute,
        num_devices=devices,
        overhead_bytes=hardware.overhead_bytes,
    )
    step_s = step_seconds(compute_s, communication_s, settings.strategy)
    return TrainingPlan(
        devices,
        settings.batch_size,
        tokens_per_step,
        step_flops(trained.shape, tokens, passes),
        memory,
        compute_s,
        communication_s,
        step_s,
        sent,
    )


def rloo_plan(
    settings: RlooConfig,
    shape: ModelShape,
    reward_shapes: tuple[ModelShape, ...],
    lengths: Lengths,
    hardware: Hardware,
    *,
    update: WeightUpdate | None = None,
) -> RlooPlan:
    """Return the plan of an RLOO step.

    `reward_shapes` are the shapes of the models that score every completion. `update` is the weight update of engines
    beside the trainer; without it, the update goes over NCCL.
    """
    num_completions, num_trainers = settings.num_completions_per_prompt, settings.trainers.num_workers
    sampling = Sampling(
        settings.num_prompts_per_step,
        num_completions,
        lengths.prompt_tokens,
        lengths.completion_tokens,
        settings.max_new_tokens,
    )
    engines = Engines(
        settings.num_engines,
        settings.tensor_parallel_size,
        settings.max_num_sequences,
        DTYPE_BYTES[settings.engine_dtype],
    )
    limit = settings.max_tokens_per_micro_batch
    tokens = _tokens(
        lengths, settings.num_prompts_per_step / num_trainers, num_completions, is_policy=True, max_tokens=limit
    )
    trained = Trained(shape, shape.policy_parameters, shape.policy_parameters, has_reference=True)
    num_updates = settings.num_epochs_per_step * settings.num_minibatches_per_epoch
    keeps_graph = num_updates == 1 and tokens.num_micro_batches == 1
    recomputed = 1 if settings.compute.gradient_checkpointing else 0
    of_update = Passes(recomputed if keeps_graph else 1 + recomputed, 1)
    epochs = settings.num_epochs_per_step
    scored = _tokens(lengths, settings.num_prompts_per_step, num_completions, is_policy=False, max_tokens=limit)
    rate = hardware.peak_flops_per_s * hardware.utilisation
    return RlooPlan(
        generate_s=generation_seconds(shape, sampling, engines, hardware),
        measure_s=compute_seconds(trained, tokens, Passes(1, 0, num_frozen=1), hardware, num_updates=0),
        update_s=epochs
        * compute_seconds(trained, tokens, of_update, hardware, num_updates=settings.num_minibatches_per_epoch),
        score_device_s=sum(forward_flops(other, scored) for other in reward_shapes) / rate,
        memory=trainer_memory(
            trained,
            _largest_micro_batch(tokens, limit),
            strategy=settings.strategy,
            compute=settings.compute,
            num_devices=num_trainers,
            overhead_bytes=hardware.overhead_bytes,
        ),
        weight_update=update
        or nccl_update(shape, engines, hardware, num_trainers=num_trainers, is_sharded=settings.strategy.kind != "ddp"),
        object_store_bytes=object_store_bytes(sampling, shape.vocab_size),
        engines=engines,
        num_trainers=num_trainers,
    )


def _tokens(lengths: Lengths, num_groups: float, num_completions: int, *, is_policy: bool, max_tokens: int) -> Tokens:
    """Return the tokens of one device's groups of a step, in full micro-batches."""
    num_tokens = num_groups * lengths.group_tokens(num_completions)
    predicted = num_groups * num_completions * lengths.completion_tokens if is_policy else 0
    num_micro_batches = math.ceil(num_tokens / max_tokens)
    visible = lengths.visible(num_completions)
    return Tokens(num_tokens, visible, num_groups, num_completions, predicted, num_micro_batches)


def _largest_micro_batch(tokens: Tokens, max_tokens: int) -> MicroBatch:
    largest = min(tokens.num_tokens, max_tokens)
    share = largest / tokens.num_tokens
    return MicroBatch(
        largest, share * tokens.num_predicted, None if tokens.num_scored is None else share * tokens.num_scored
    )
