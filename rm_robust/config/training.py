"""Settings of what is trained before RLOO: the model, SFT and the reward model."""

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from rm_robust.config.objectives import BsrScale, BsrScope, Objective
from rm_robust.config.shared import ComputeConfig, OptimizerConfig, Section, StrategyConfig, WorkersConfig


class ModelConfig(Section):
    """The language model under the policy and the reward model."""

    path: str | None = None
    """Hugging Face directory or hub name. None: a small Qwen2 and its byte-level BPE tokenizer are made from scratch in the SFT stage."""
    vocab_size: int = Field(default=800, ge=300, le=200000)
    """From-scratch model only, as the next five."""
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
                f"model.hidden_size = {self.hidden_size} over num_heads = {self.num_heads} must be a multiple of 32 per head (vLLM's CPU kernels)"
            )
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"model.num_heads = {self.num_heads} must be a multiple of model.num_kv_heads = {self.num_kv_heads}"
            )
        return self


class LoraConfig(Section):
    """Low-rank adapters (PEFT), without dropout: the decoder's own weights are frozen; the score head is trained whole."""

    rank: int = Field(default=16, ge=1)
    alpha: int = Field(default=32, ge=1)
    """Adapters are scaled by alpha / rank."""
    target_modules: tuple[str, ...] | Literal["all-linear"] = "all-linear"
    """Names of linear layers (q_proj, …)."""


def _check_workers(section: str, batch_size: int, workers: WorkersConfig, strategy: StrategyConfig) -> None:
    if batch_size < workers.num_workers:
        raise ValueError(
            f"{section}.batch_size = {batch_size} leaves some of {section}.workers.num_workers = {workers.num_workers} workers without a row; "
            "raise the one or lower the other"
        )
    if workers.min_workers is not None and strategy.kind == "deepspeed":
        raise ValueError(
            f'{section}.workers.min_workers needs {section}.strategy.kind = "ddp" or "fsdp2": DeepSpeed resumes with the same number of workers only'
        )


class SftConfig(Section):
    """Supervised fine-tuning: the policy before RLOO and the reward model's backbone."""

    enabled: bool = True
    """False: model.path is already fine-tuned and is used as it is."""
    batch_size: int = Field(default=64, ge=1)
    """Examples per optimiser step, all workers."""
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
"""Which objectives read a setting: one that is changed for another objective is refused, not ignored."""


class RewardModelConfig(Section):
    """Reward-model training on preference pairs."""

    base_path: str | None = None
    """Language model to start from; None: the SFT stage's output."""
    objective: Objective = Objective.BATCH_SUM_TO_ZERO
    preset: Literal["released_code"] | None = None
    """`released_code`: BSR as the paper's code computes it, bsr_scope = "micro" and bsr_scale = "pairs"; set bsr_micro_pairs to its per-device batch."""
    bsr_coefficient: float = Field(default=1e-3, ge=0)
    """lambda of paper Eq. 24."""
    bsr_scale: BsrScale = BsrScale.PAIRS
    bsr_scope: BsrScope = BsrScope.STEP
    bsr_micro_pairs: int | None = Field(default=None, ge=1)
    """bsr_scope = "micro" only: pairs of a block; a worker's part of the batch must be a multiple."""
    margin: float | None = Field(default=None, ge=0)
    """Score units. objective = "margin": None takes every pair's own, from the data's `margin` column. objective = "hinge": must be set, above 0."""
    norm_epsilon: float = Field(default=1e-6, gt=0)
    """objective = "bt_norm" only: added to chosen^2 + rejected^2 (score units squared)."""
    norm_temperature: float = Field(default=1.0, gt=0)
    """objective = "bt_norm" only."""
    centering_coefficient: float = Field(default=0.01, ge=0)
    """objective = "centering" only; TRL's center_rewards_coefficient."""
    bt_twin: bool = False
    """Also train the paper's baseline: Bradley-Terry from the same weights on the same batches in the same order, for the report to compare."""
    batch_size: int = Field(default=64, ge=1)
    """Preference pairs per optimiser step, all workers."""
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
    """Scenarios scored during training; each logs <name>_accuracy over all pairs of its completions whose gold scores differ."""
    num_evaluation_pairs: int = Field(default=256, ge=1)
    """Prompts of each scenario scored during training."""
    best_metric: str | None = None
    """<name>_accuracy of an evaluation set: its best evaluation is kept and becomes the checkpoint. None: the last step does."""
    early_stopping_evaluations: int | None = Field(default=None, ge=1)
    """Stop after so many evaluations without a new best of best_metric."""
    checkpoint_every_steps: int = Field(default=25, ge=1)
    num_kept_checkpoints: int = Field(default=1, ge=1)
    """Last training states kept for resuming, beside the best."""

    @model_validator(mode="before")
    @classmethod
    def _preset_sets_its_values(cls, values: Any) -> Any:
        if not isinstance(values, dict) or values.get("preset") != "released_code":
            return values
        if values.get("bsr_scale", BsrScale.PAIRS) != BsrScale.PAIRS:
            raise ValueError(
                'reward_model.preset = "released_code" has bsr_scale = "pairs", and bsr_scale = "none" is set; remove one of them'
            )
        if values.get("bsr_scope", BsrScope.MICRO) != BsrScope.MICRO:
            raise ValueError(
                'reward_model.preset = "released_code" has bsr_scope = "micro", and bsr_scope = "step" is set; remove one of them'
            )
        return {**values, "bsr_scope": BsrScope.MICRO}

    @model_validator(mode="after")
    def _twins_differ(self) -> Self:
        if self.bt_twin and self.objective is Objective.BRADLEY_TERRY:
            raise ValueError(
                'reward_model.bt_twin = true with objective = "bt" would train the same model twice; choose another objective, or leave it out'
            )
        return self

    def as_bt_twin(self) -> "RewardModelConfig":
        """The same training with the Bradley-Terry objective, without what other objectives read."""
        own = {"objective", "bt_twin", *_READ_BY}
        return RewardModelConfig(
            objective=Objective.BRADLEY_TERRY,
            **{name: getattr(self, name) for name in type(self).model_fields if name not in own},
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
                f'reward_model.best_metric = "{self.best_metric}" is not evaluated; choose from {known}, or add to evaluation_sets'
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
                    f'reward_model.{name} = {getattr(self, name)!r} is not read by objective = "{self.objective}"; remove it, or choose {" or ".join(readers)}'
                )
        if self.objective is Objective.HINGE and not self.margin:
            raise ValueError(
                'reward_model.objective = "hinge" needs reward_model.margin > 0 (with 0 it stops learning as soon as a pair is ordered)'
            )
        if self.bsr_scope is BsrScope.MICRO:
            if self.bsr_micro_pairs is None:
                raise ValueError(
                    'reward_model.bsr_scope = "micro" needs reward_model.bsr_micro_pairs, the pairs of a block'
                )
            for num_workers in range(self.workers.fewest, self.workers.num_workers + 1):
                if self.batch_size % (num_workers * self.bsr_micro_pairs):
                    raise ValueError(
                        f"reward_model.batch_size = {self.batch_size} must be a multiple of workers.num_workers x bsr_micro_pairs = "
                        f"{num_workers} x {self.bsr_micro_pairs}, so that every block is full"
                    )
        elif self.bsr_micro_pairs is not None:
            raise ValueError('reward_model.bsr_micro_pairs is read only with bsr_scope = "micro"')
        return self
