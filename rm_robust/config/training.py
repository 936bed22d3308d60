"""Settings of the stages before RLOO: the language model, SFT and the reward model."""

from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from rm_robust.config.objectives import BsrScale, BsrScope, Objective
from rm_robust.config.shared import (
    DEEPSPEED_STATE,
    ComputeConfig,
    MayGrow,
    OptimizerConfig,
    Section,
    StrategyConfig,
    WhereItRuns,
    WorkersConfig,
)


class ModelConfig(Section):
    """The language model from which the policy and the reward model are made."""

    path: str | None = None
    """Hugging Face directory or hub name. None: the SFT stage makes a small Qwen2 and its byte-level BPE tokenizer from
    scratch."""
    vocab_size: int = Field(default=800, ge=300, le=200000)
    """Number of tokens of the vocabulary that the tokenizer learns. This setting and the next six are for a model from
    scratch only."""
    hidden_size: int = Field(default=128, ge=32)
    """Width of the hidden states. It must be a multiple of 32 * num_heads (vLLM's kernels for CPUs)."""
    intermediate_size: int = Field(default=448, ge=32)
    """Width inside each feed-forward block."""
    num_layers: int = Field(default=4, ge=1)
    """Number of decoder layers."""
    num_heads: int = Field(default=4, ge=1)
    """Number of attention heads. It must be a multiple of num_kv_heads."""
    num_kv_heads: int = Field(default=4, ge=1)
    """Number of key-value heads, each shared by num_heads / num_kv_heads attention heads."""
    max_position_embeddings: int = Field(default=256, ge=32)
    """Longest text that the model takes, in tokens. It must be at least data.max_prompt_tokens +
    data.max_completion_tokens."""

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
    """Rank of the two factors of an adapter. A higher one has more weights to train."""
    alpha: int = Field(default=32, ge=1)
    """The adapters are scaled by alpha / rank."""
    target_modules: tuple[str, ...] | Literal["all-linear"] = "all-linear"
    """Names of the linear layers that get adapters (q_proj, …). `all-linear`: every linear layer of the decoder."""


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
    """Train this stage. False: model.path, which must then be set, is fine-tuned already and is used as it is."""
    batch_size: int = Field(default=64, ge=1)
    """Number of demonstrations of an optimiser step, over all workers. It must be at least workers.num_workers."""
    num_epochs: MayGrow[float] = Field(default=1.0, gt=0)
    """Passes over the demonstrations; a fraction is allowed. The number of steps is rounded up."""
    max_tokens_per_micro_batch: WhereItRuns[int] = Field(default=8192, ge=64)
    """Largest number of tokens (padding included) of one forward and backward pass of a worker; a longer group has a
    pass of its own. It changes memory and speed, not the gradient."""
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=3e-3, schedule="cosine")
    """How the fine-tuned model's weights are updated."""
    strategy: StrategyConfig = StrategyConfig()
    """What each worker holds of the model."""
    compute: ComputeConfig = ComputeConfig()
    """Number format and memory of the training."""
    workers: WorkersConfig = WorkersConfig()
    """Workers of the fine-tuning."""
    checkpoint_every_steps: WhereItRuns[int] = Field(default=100, ge=1)
    """Steps between two committed training states. A stopped run resumes from the last one; the last step is always
    committed."""

    def held_on_resume(self) -> Mapping[str, str]:
        held = dict(super().held_on_resume())
        return held | ({"workers.num_workers": DEEPSPEED_STATE} if self.strategy.kind == "deepspeed" else {})

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
    """What training minimises. `bt`: the Bradley-Terry loss. `margin`: Bradley-Terry with a margin that a pair must
    reach, a constant or the data's `margin` column. `hinge`: the margin minus the score difference where that is
    positive, else 0. `bt_norm`: Bradley-Terry on the score difference divided by the length of the vector (chosen,
    rejected). `bt_dr`: Bradley-Terry, with further losses that push chosen scores above 0 and rejected scores below 0.
    `centering`: Bradley-Terry, with a penalty on the mean square of chosen + rejected. `bsr`: Bradley-Terry, with a
    penalty on the square of the mean of all scores. A setting that is changed and that the objective does not read is
    refused."""
    preset: Literal["released_code"] | None = None
    """`released_code` (objective = "bsr" only): BSR as the paper's code computes it, with bsr_scope = "micro" and
    bsr_scale = "pairs"; set bsr_micro_pairs to that code's per-device batch. None: the two settings have their own
    values."""
    bsr_coefficient: float = Field(default=1e-3, ge=0)
    """Weight of BSR's penalty (objective = "bsr" only); lambda of paper Eq. 24. Times bsr_scale it is the effective
    coefficient, which every step reports as reward_model/effective_coefficient."""
    bsr_scale: BsrScale = BsrScale.PAIRS
    """Factor of BSR's penalty (objective = "bsr" only). `pairs`: bsr_coefficient times the number of pairs in scope, as
    in the released code. `none`: bsr_coefficient alone, as the paper prints it."""
    bsr_scope: BsrScope = BsrScope.STEP
    """Pairs over which BSR takes its mean (objective = "bsr" only). `step`: all pairs of the optimiser step. `micro`:
    each block of bsr_micro_pairs pairs, as in the released code."""
    bsr_micro_pairs: int | None = Field(default=None, ge=1)
    """Pairs of a block; it must be set with bsr_scope = "micro", and is refused otherwise. batch_size must be a
    multiple of it times the number of workers."""
    margin: float | None = Field(default=None, ge=0)
    """Margin in score units. With objective = "margin", None takes each pair's own margin from the data's `margin`
    column. With objective = "hinge" it must be set, above 0."""
    norm_epsilon: float = Field(default=1e-6, gt=0)
    """Constant that is added to chosen^2 + rejected^2, in score units squared (objective = "bt_norm" only)."""
    norm_temperature: float = Field(default=1.0, gt=0)
    """Temperature of objective = "bt_norm", the only one that reads it."""
    centering_coefficient: float = Field(default=0.01, ge=0)
    """Weight of the penalty of objective = "centering", the only one that reads it (TRL's
    center_rewards_coefficient)."""
    bt_twin: bool = False
    """Train the paper's baseline too, so that the report can compare: Bradley-Terry from the same weights on the same
    batches in the same order. It is refused with objective = "bt", which is the baseline."""
    batch_size: int = Field(default=64, ge=1)
    """Number of preference pairs of an optimiser step, over all workers. It must be at least workers.num_workers."""
    num_epochs: MayGrow[float] = Field(default=1.0, gt=0)
    """Passes over the training pairs; a fraction is allowed. The number of steps is rounded up."""
    max_tokens_per_micro_batch: WhereItRuns[int] = Field(default=8192, ge=64)
    """Largest number of tokens (padding included) of one forward and backward pass of a worker; a longer group has a
    pass of its own. It changes memory and speed, not the gradient."""
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=5e-4)
    """How the reward model's weights are updated."""
    strategy: StrategyConfig = StrategyConfig()
    """What each worker holds of the reward model."""
    compute: ComputeConfig = ComputeConfig()
    """Number format and memory of the training."""
    lora: LoraConfig | None = None
    """Adapters that are trained in place of the decoder's weights. None: every weight is trained."""
    workers: WorkersConfig = WorkersConfig()
    """Workers of the reward-model training."""
    evaluate_every_steps: int = Field(default=25, ge=1)
    """Steps between two evaluations on evaluation_sets. There is always one after the last step."""
    evaluation_sets: tuple[Literal["in_domain", "prompt_disjoint", "response_disjoint", "mutual_disjoint"], ...] = (
        "in_domain",
    )
    """Scenarios that are scored during training. Each logs `<name>_accuracy` over all pairs of its completions whose
    gold scores differ."""
    num_evaluation_pairs: int = Field(default=256, ge=1)
    """Number of prompts of each scenario that are scored during training."""
    best_metric: str | None = None
    """`<name>_accuracy` of one of the evaluation_sets. The state of its best evaluation is kept, and becomes the
    checkpoint. None: the last step becomes the checkpoint."""
    early_stopping_evaluations: int | None = Field(default=None, ge=1)
    """Number of evaluations without a new best of best_metric, which must be set, after which training stops. None:
    training does not stop early."""
    checkpoint_every_steps: WhereItRuns[int] = Field(default=25, ge=1)
    """Steps between two committed training states. A stopped run resumes from the last one; the last step is always
    committed."""
    num_kept_checkpoints: WhereItRuns[int] = Field(default=1, ge=1)
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

    def held_on_resume(self) -> Mapping[str, str]:
        held = dict(super().held_on_resume())
        if self.strategy.kind == "deepspeed":
            held["workers.num_workers"] = DEEPSPEED_STATE
        elif self.bsr_scope is BsrScope.MICRO:
            held["workers.num_workers"] = "the blocks of bsr_micro_pairs are cut from each worker's pairs"
        return held

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
