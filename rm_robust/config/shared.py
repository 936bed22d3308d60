"""What the settings of several stages are made of: workers, optimiser, strategy, arithmetic."""

from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Section(BaseModel):
    """Base of every section: frozen, no unknown keys, defaults checked too."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    @model_validator(mode="before")
    @classmethod
    def _partial_section_keeps_its_defaults(cls, values: Any) -> Any:
        """`[rloo.trainers] num_workers = 2` changes that one key of RlooConfig's own default, not of WorkersConfig's."""
        if not isinstance(values, dict):
            return values
        given = dict(values)
        for name, field in cls.model_fields.items():
            if isinstance(field.default, Section) and isinstance(given.get(name), dict):
                given[name] = {**field.default.model_dump(exclude_unset=True), **given[name]}
        return given


class WorkersConfig(Section):
    """What a group of workers asks of the cluster."""

    num_workers: int = Field(default=2, ge=1)
    min_workers: int | None = Field(default=None, ge=1)
    """Elastic training: it goes on with as few when nodes are lost, from the last committed state, and grows again when they return; batches stay the
    same ones. None: always `num_workers`. Not with DeepSpeed, whose state is cut for one number of workers."""
    resize_every_s: float = Field(default=60, gt=0)
    """Elastic training only: how often a group that is too small looks for room to grow."""
    num_cpus_per_worker: float = Field(default=1, ge=0)
    num_gpus_per_worker: float = Field(default=0, ge=0)
    num_threads_per_worker: int = Field(default=1, ge=1)
    """torch threads of one worker on CPU."""
    peak_flops_per_worker: float | None = Field(default=None, gt=0)
    """Floating-point operations a second of one worker's device at the precision in use (H100, bfloat16, dense: 989e12); None: no utilisation."""
    resources_per_worker: dict[str, float] = {}
    """Custom Ray resources, as named in cluster.yaml."""

    @model_validator(mode="after")
    def _shrinks(self) -> Self:
        if self.min_workers is not None and self.min_workers > self.num_workers:
            raise ValueError(
                f"min_workers = {self.min_workers} is more than num_workers = {self.num_workers}; lower it, or leave it out"
            )
        return self

    @property
    def fewest(self) -> int:
        return self.min_workers or self.num_workers


class OptimizerConfig(Section):
    """AdamW with warm-up; one clip value for every strategy."""

    learning_rate: float = Field(default=1e-3, gt=0, lt=1)
    """Peak, reached after `warmup_fraction` of the steps."""
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    """What follows warm-up; linear and cosine end at zero."""
    warmup_fraction: float = Field(default=0.05, ge=0, lt=1)
    weight_decay: float = Field(default=0.0, ge=0)
    max_gradient_norm: float = Field(default=1.0, gt=0)
    kind: Literal["adamw", "sgd"] = "adamw"
    """`sgd` exists for parity tests: AdamW hides errors of gradient scale."""


class StrategyConfig(Section):
    """How parameters, gradients and optimiser state lie over the workers."""

    kind: Literal["ddp", "fsdp2", "deepspeed"] = "ddp"
    """`ddp`: every worker holds everything. `fsdp2`: all three are sharded. `deepspeed`: ZeRO, sharded by stage."""
    zero_stage: Literal[1, 2, 3] = 2
    """DeepSpeed only: optimiser state (1), gradients too (2), parameters too (3)."""
    cpu_offload: bool = False
    """Keep the shards of the optimiser state (fsdp2: of parameters and gradients too) in main memory; not with ddp."""

    @model_validator(mode="after")
    def _only_shards_are_offloaded(self) -> Self:
        if self.cpu_offload and self.kind == "ddp":
            raise ValueError(
                'strategy.cpu_offload = true needs something sharded to offload; set strategy.kind to "fsdp2" or "deepspeed"'
            )
        return self


class ComputeConfig(Section):
    """How forward and backward passes are computed. Weights, optimiser state and score head are float32 in every case."""

    precision: Literal["float32", "bfloat16"] = "float32"
    """`bfloat16`: torch autocast around the decoder."""
    gradient_checkpointing: bool = False
    """Keep one activation a decoder layer and compute the others again in the backward pass: less memory, about a third more time."""
    compile: bool = False
    """torch.compile the decoder's feed-forward blocks (attention has kernels of its own). The first steps take minutes; it needs a C++ compiler on CPU."""
