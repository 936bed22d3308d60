"""Sections that several stages have in common: workers, optimiser, strategy, precision."""

from collections.abc import Mapping
from enum import StrEnum
from typing import Annotated, Any, Literal, Self, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, Field, model_validator

Value = TypeVar("Value")


class OnResume(StrEnum):
    """What a resumed run does when a setting has another value than before.

    A field has it in its annotation (`MayGrow[int]`). A field without it decides results.
    """

    DECIDES_RESULTS = "decides results"
    """Another value is refused."""
    MAY_GROW = "may grow"
    """A larger value continues a stage that was done; a smaller one is refused."""
    WHERE_IT_RUNS = "where it runs"
    """Another value is taken: results stay equal, but for the order in which numbers are added."""


DEEPSPEED_STATE = "DeepSpeed's state is cut for one number of workers"
"""Why another number of workers cannot continue from a state."""

MayGrow = Annotated[Value, OnResume.MAY_GROW]
WhereItRuns = Annotated[Value, OnResume.WHERE_IT_RUNS]


class Section(BaseModel):
    """The base of every section of a config. It is frozen, refuses unknown keys, and checks its defaults too."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    @model_validator(mode="before")
    @classmethod
    def _partial_section_keeps_its_defaults(cls, values: Any) -> Any:
        """Complete a partly given section with the default of the section around it.

        `[rloo.trainers] num_workers = 2` changes one key of RlooConfig's default, not of WorkersConfig's.
        """
        if not isinstance(values, dict):
            return values
        given = dict(values)
        for name, field in cls.model_fields.items():
            if isinstance(field.default, Section) and isinstance(given.get(name), dict):
                given[name] = {**field.default.model_dump(exclude_unset=True), **given[name]}
        return given

    def held_on_resume(self) -> Mapping[str, str]:
        """Return the settings below this section that decide results here, though they say where it runs elsewhere.

        The keys are dotted names below this section, the values say why.
        """
        return {
            f"{name}.{setting}": reason
            for name, section in self
            if isinstance(section, Section)
            for setting, reason in section.held_on_resume().items()
        }


def section_in(annotation: Any) -> type[BaseModel] | None:
    """Return the section that a type is, or that it holds (optional, or in a list)."""
    for kind in (annotation, *get_args(annotation)):
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            return kind
    return None


class WorkersConfig(Section):
    """What a group of workers asks of the cluster."""

    num_workers: WhereItRuns[int] = Field(default=2, ge=1)
    """Number of worker processes. They share each batch, which must have at least one row (or group) for each of
    them."""
    min_workers: WhereItRuns[int | None] = Field(default=None, ge=1)
    """Fewest workers of elastic training, at most `num_workers`. When nodes are lost, training continues from the last
    committed state as long as this many workers have room, and grows again when nodes return; the batches stay the
    same. None: always `num_workers`. DeepSpeed refuses this setting, because its state is cut for one number of
    workers; so does RLOO, which replaces a lost trainer."""
    resize_every_s: WhereItRuns[float] = Field(default=60, gt=0)
    """Seconds after which a group that is too small looks for room to grow again (elastic training only)."""
    num_cpus_per_worker: WhereItRuns[float] = Field(default=1, ge=0)
    """CPUs that Ray sets aside for one worker. They decide how many workers a node takes, not how many threads
    compute."""
    num_gpus_per_worker: WhereItRuns[float] = Field(default=0, ge=0)
    """GPUs that Ray sets aside for one worker. 0: the worker computes on the CPU."""
    num_threads_per_worker: WhereItRuns[int] = Field(default=1, ge=1)
    """Threads that torch uses on the CPU in one worker."""
    peak_flops_per_worker: WhereItRuns[float | None] = Field(default=None, gt=0)
    """Floating-point operations a second of one worker's device at the precision in use (H100, bfloat16, dense:
    989e12). None: the utilisation is not computed."""
    resources_per_worker: WhereItRuns[dict[str, float]] = {}
    """Custom Ray resources of one worker, as named in cluster.yaml."""

    @model_validator(mode="after")
    def _min_workers_fits(self) -> Self:
        if self.min_workers is not None and self.min_workers > self.num_workers:
            raise ValueError(
                f"min_workers = {self.min_workers} is more than num_workers = {self.num_workers}; "
                "lower it, or leave it out"
            )
        return self

    @property
    def fewest(self) -> int:
        """The number of workers without which the group cannot run."""
        return self.min_workers or self.num_workers


class OptimizerConfig(Section):
    """The optimiser: AdamW with warm-up. Every strategy clips gradients at the same norm."""

    learning_rate: float = Field(default=1e-3, gt=0, lt=1)
    """Peak learning rate, which is reached after `warmup_fraction` of the steps."""
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    """The learning rate after warm-up. `linear` and `cosine` fall so that the step after the last would have zero."""
    warmup_fraction: float = Field(default=0.05, ge=0, lt=1)
    """Share of the steps in which the learning rate rises linearly to its peak."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Weight decay of matrices, per step and multiplied by the learning rate. Norms and biases have none."""
    max_gradient_norm: float = Field(default=1.0, gt=0)
    """Largest norm of the gradient of all weights together. A longer gradient is scaled down to it."""
    kind: Literal["adamw", "sgd"] = "adamw"
    """Rule of the update: AdamW, or plain gradient descent. `sgd` is for parity tests, because AdamW hides errors in
    the scale of gradients."""


class StrategyConfig(Section):
    """How parameters, gradients and optimiser state are distributed over the workers."""

    kind: Literal["ddp", "fsdp2", "deepspeed"] = "ddp"
    """`ddp`: every worker holds parameters, gradients and optimiser state. `fsdp2`: all three are sharded. `deepspeed`:
    ZeRO shards what zero_stage says."""
    zero_stage: Literal[1, 2, 3] = 2
    """What DeepSpeed shards (kind = "deepspeed" only). 1: the optimiser state; 2: also the gradients; 3: also the
    parameters."""
    cpu_offload: bool = False
    """Keep the shards of the optimiser state (fsdp2: also of parameters and gradients) in main memory; not with ddp."""

    @model_validator(mode="after")
    def _only_shards_are_offloaded(self) -> Self:
        if self.cpu_offload and self.kind == "ddp":
            raise ValueError(
                "strategy.cpu_offload = true needs something sharded to offload; "
                'set strategy.kind to "fsdp2" or "deepspeed"'
            )
        return self


class ComputeConfig(Section):
    """How forward and backward passes are computed. Weights, optimiser state and score head are always float32."""

    precision: Literal["float32", "bfloat16"] = "float32"
    """Number format of the decoder's matrix products. `bfloat16`: the decoder runs under torch's autocast."""
    gradient_checkpointing: WhereItRuns[bool] = False
    """Keep one activation of each decoder layer, and compute the others again in the backward pass. This takes less
    memory, and about a third more time."""
    compile: bool = False
    """Compile the decoder's feed-forward blocks with torch.compile (attention has kernels of its own). The first steps
    take minutes. On a CPU it needs a C++ compiler."""
