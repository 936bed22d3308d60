"""Settings of the stages before RLOO: the language model, SFT and the reward model."""

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from rm_robust.config.objectives import BsrScale, BsrScope, Objective
from rm_robust.config.shared import ComputeConfig, OptimizerConfig, Section, StrategyConfig, WorkersConfig


class ModelConfig(Section):
    """The language model from which the policy and the reward model are made."""

    path: str | None = None
    """Hugging Face directory or hub name. None: the SFT stage makes a small Qwen2 and its byte-level BPE tokenizer from
    scratch."""
    vocab_size: int = Field(default=800, ge=300, le=200000)
    """Tokens of the vocabulary. This setting and the next six are for a model from scratch only."""
    hidden_size: int = Field(default=128, ge=32)
    intermediate_size: int = Field(default=448, ge=32)
    num_layers: int = Field(default=4, ge=1)
    num_heads: int = Field(default=4, ge=1)
    num_kv_heads: int = Field(default=4, ge=1)
    max_position_embeddings: int = Field(default=256, ge=32)

    @model_validator(mode="after")
    def _heads_fit(self) -> Self:
        if self.hidden_size % self.num_heads or (self.hidden_size // self.num_heads) % 32:
            raise ValueError(
                f"model.hidden_size = {self.hidden_size} over num_heads = {self.num_heads} "
                "must be a multiple of 32 per head (vLLM's CPU kernels)"
            )
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"model.num_heads = {self.num_heads} must be a multiple of model.num_kv_heads = {self.num_kv_heads}"
            )
        return self


class LoraConfig(Section):
    """Low-rank adapters (PEFT) without dropout.

    The decoder's own weights are frozen, and the score head is trained in full.
    """

    rank: int = Field(default=16, ge=1)
    alpha: int = Field(default=32, ge=1)
    """The adapters are scaled by alpha / rank."""
    target_modules: tuple[str, ...] | Literal["all-linear"] = "all-linear"
    """Names of the linear layers that get adapters (q_proj, …)."""


def _check_workers(section: str, batch_size: int, workers: WorkersConfig, strategy: StrategyConfig) -> None:
    if batch_size < workers.num_workers:
        raise ValueError(
            f"{section}.batch_size = {batch_size} leaves some of {section}.workers.num_workers = {workers.num_workers} "
            "workers without a row; raise the one or lower the other"
        )
    if workers.min_workers is not None and strategy.kind == "deepspeed":
        raise ValueError(
            f'{section}.workers.min_workers needs {section}.strategy.kind = "ddp" or "fsdp2": '
            "DeepSpeed resumes with the same number of workers only"
        )


class SftConfig(Section):
    """Settings of supervised fine-tuning, which makes the policy before RLOO and the reward model's backbone."""

    enabled: bool = True
    """False: model.path is fine-tuned already, and is used as it is."""
    batch_size: int = Field(default=64, ge=1)
    """Examples per optimiser step, over all workers."""
    num_epochs: float = Field(default=1.0, gt=0)
    max_tokens_per_micro_batch: int = Field(default=8192, ge=64)
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=3e-3, schedule="cosine")
    strategy: StrategyConfig = StrategyConfig()
    compute: ComputeConfig = ComputeConfig()
    workers: WorkersConfig = WorkersConfig()
    checkpoint_every_steps: int = Field(default=100, ge=1)

    @model_validator(mode="after")
    def _every_worker_has_a_row(self) -> Self:
        _check_workers("sft", self.batch_size, self.workers, self.strategy)
        return self


_READ_BY: dict[str, tuple[Objective, ...]] = {
    "preset": (Objective.BATCH_SUM_TO_ZERO,),
    "bsr_coefficient": (Objective.BATCH_SUM_TO_ZERO,),
    "bsr_scale": (Objective.BATCH_SUM_TO_ZERO,),
    "bsr_scope": (Objective.BATCH_SUM_TO_ZERO,),
    "bsr_micro_pairs": (Objective.BATCH_SUM_TO_ZERO,),
    "margin": (Objective.MARGIN, Objective.HINGE),
    "norm_epsilon": (Objective.BT_NORM,),
    "norm_temperature": (Objective.BT_NORM,),
    "centering_coefficient": (Objective.CENTERING,),
}
"""The objectives that read a setting. A setting that is changed for another objective is refused, not ignored."""


class RewardModelConfig(Section):
    """Settings of reward-model training on preference pairs."""

    base_path: str | None = None
    """Language model to start from. None: the output of the SFT stage."""
    objective: Objective = Objective.BATCH_SUM_TO_ZERO
    preset: Literal["released_code"] | None = None
    """`released_code`: BSR as the paper's code computes it, with bsr_scope = "micro" and bsr_scale = "pairs"; set
    bsr_micro_pairs to that code's per-device batch."""
    bsr_coefficient: float = Field(default=1e-3, ge=0)
    """lambda of paper Eq. 24."""
    bsr_scale: BsrScale = BsrScale.PAIRS
    bsr_scope: BsrScope = BsrScope.STEP
    bsr_micro_pairs: int | None = Field(default=None, ge=1)
    """Pairs of a block (bsr_scope = "micro" only). A worker's part of the batch must be a multiple of it."""
    margin: float | None = Field(default=None, ge=0)
    """Margin in score units. With objective = "margin", None takes each pair's own margin from the data's `margin`
    column. With objective = "hinge" it must be set, above 0."""
    norm_epsilon: float = Field(default=1e-6, gt=0)
    """Constant that is added to chosen^2 + rejected^2, in score units squared (objective = "bt_norm" only)."""
    norm_temperature: float = Field(default=1.0, gt=0)
    """Temperature of objective = "bt_norm", the only one that reads it."""
    centering_coefficient: float = Field(default=0.01, ge=0)
    """TRL's center_rewards_coefficient (objective = "centering" only)."""
    bt_twin: bool = False
    """Train the paper's baseline too, so that the report can compare: Bradley-Terry from the same weights on the same
    batches in the same order."""
    batch_size: int = Field(default=64, ge=1)
    """Preference pairs per optimiser step, over all workers."""
    num_epochs: float = Field(default=1.0, gt=0)
    max_tokens_per_micro_batch: int = Field(default=8192, ge=64)
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=5e-4)
    strategy: StrategyConfig = StrategyConfig()
    compute: ComputeConfig = ComputeConfig()
    lora: LoraConfig | None = None
    """None: every weight is trained."""
    workers: WorkersConfig = WorkersConfig()
    evaluate_every_steps: int = Field(default=25, ge=1)
    evaluation_sets: tuple[Literal["in_domain", "prompt_disjoint", "response_disjoint", "mutual_disjoint"], ...] = (
        "in_domain",
    )
    """Scenarios that are scored during training. Each logs <name>_accuracy over all pairs of its completions whose gold
    scores differ."""
    num_evaluation_pairs: int = Field(default=256, ge=1)
    """Number of prompts of each scenario that are scored during training."""
    best_metric: str | None = None
    """<name>_accuracy of an evaluation set. The state of its best evaluation is kept, and becomes the checkpoint. None:
    the last step becomes the checkpoint."""
    early_stopping_evaluations: int | None = Field(default=None, ge=1)
    """Number of evaluations without a new best of best_metric after which training stops."""
    checkpoint_every_steps: int = Field(default=25, ge=1)
    num_kept_checkpoints: int = Field(default=1, ge=1)
    """Number of latest training states that are kept for resuming, beside the best one."""

    @model_validator(mode="before")
    @classmethod
    def _preset_sets_its_values(cls, values: Any) -> Any:
        if not isinstance(values, dict) or values.get("preset") != "released_code":
            return values
        if values.get("bsr_scale", BsrScale.PAIRS) != BsrScale.PAIRS:
            raise ValueError(
                'reward_model.preset = "released_code" has bsr_scale = "pairs", and bsr_scale = "none" is set; '
                "remove one of them"
            )
        if values.get("bsr_scope", BsrScope.MICRO) != BsrScope.MICRO:
            raise ValueError(
                'reward_model.preset = "released_code" has bsr_scope = "micro", and bsr_scope = "step" is set; '
                "remove one of them"
            )
        return {**values, "bsr_scope": BsrScope.MICRO}

    @model_validator(mode="after")
    def _twins_differ(self) -> Self:
        if self.bt_twin and self.objective is Objective.BRADLEY_TERRY:
            raise ValueError(
                'reward_model.bt_twin = true with objective = "bt" would train the same model twice; '
                "choose another objective, or leave it out"
            )
        return self

    def as_bt_twin(self) -> "RewardModelConfig":
        """Return these settings with the Bradley-Terry objective, and without those that only other objectives read."""
        left_out = {"objective", "bt_twin", *_READ_BY}
        return RewardModelConfig(
            objective=Objective.BRADLEY_TERRY,
            **{name: getattr(self, name) for name in type(self).model_fields if name not in left_out},
        )

    @model_validator(mode="after")
    def _every_worker_has_a_pair(self) -> Self:
        _check_workers("reward_model", self.batch_size, self.workers, self.strategy)
        return self

    @model_validator(mode="after")
    def _best_metric_is_evaluated(self) -> Self:
        known = [f"{name}_accuracy" for name in self.evaluation_sets]
        if self.best_metric is not None and self.best_metric not in known:
            raise ValueError(
                f'reward_model.best_metric = "{self.best_metric}" is not evaluated; '
                f"choose from {known}, or add to evaluation_sets"
            )
        if self.early_stopping_evaluations is not None and self.best_metric is None:
            raise ValueError(
                "reward_model.early_stopping_evaluations needs reward_model.best_metric, the metric to wait for"
            )
        return self

    @model_validator(mode="after")
    def _objective_reads_what_is_set(self) -> Self:
        for name, readers in _READ_BY.items():
            default = type(self).model_fields[name].default
            if getattr(self, name) != default and self.objective not in readers:
                raise ValueError(
                    f'reward_model.{name} = {getattr(self, name)!r} is not read by objective = "{self.objective}"; '
                    f"remove it, or choose {' or '.join(readers)}"
                )
        if self.objective is Objective.HINGE and not self.margin:
            raise ValueError(
                'reward_model.objective = "hinge" needs reward_model.margin > 0 '
                "(with 0 it stops learning as soon as a pair is ordered)"
            )
        if self.bsr_scope is BsrScope.MICRO:
            if self.bsr_micro_pairs is None:
                raise ValueError(
                    'reward_model.bsr_scope = "micro" needs reward_model.bsr_micro_pairs, the pairs of a block'
                )
            for num_workers in range(self.workers.fewest, self.workers.num_workers + 1):
                if self.batch_size % (num_workers * self.bsr_micro_pairs):
                    raise ValueError(
                        f"reward_model.batch_size = {self.batch_size} must be a multiple of workers.num_workers x "
                        f"bsr_micro_pairs = {num_workers} x {self.bsr_micro_pairs}, so that every block is full"
                    )
        elif self.bsr_micro_pairs is not None:
            raise ValueError('reward_model.bsr_micro_pairs is read only with bsr_scope = "micro"')
        return self
