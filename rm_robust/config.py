"""Every setting of a run, its default, its bound and its unit, one class per stage (RLOO's: config_rloo.py). Files and overrides: config_loading.py.

Frozen, and unknown keys are refused; combinations that cannot work are refused here, before Ray starts.
"""

from collections.abc import Sequence
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from rm_robust.config_parts import ComputeConfig, OptimizerConfig, Section, StrategyConfig, WorkersConfig
from rm_robust.config_rloo import RlooConfig
from rm_robust.records import Overlong
from rm_robust.reward_model.objectives import BsrScale, BsrScope, Objective


class WorldConfig(Section):
    """The embedded world: the default's own text, made from the seed (used when data.source = "embedded")."""

    num_sft_examples: int = Field(default=12000, ge=16)
    """Demonstrations that the policy imitates."""
    num_training_prompts: int = Field(default=3000, ge=8)
    """Prompts of the preference pairs (one training pair and one in-domain pair each)."""
    num_validation_prompts: int = Field(default=400, ge=4)
    """Prompts of the prompt-disjoint and mutual-disjoint sets."""
    num_rloo_prompts: int = Field(default=2000, ge=4)
    """Prompts that RLOO samples from; disjoint from all others."""


class WeightedPath(Section):
    """One of several training sources; a bare path has weight 1."""

    path: str = Field(min_length=1)
    weight: float = Field(default=1.0, gt=0)
    """Multiplies the weight of its pairs in the loss. A pair has weight 1, and the pairs of one ranking share 1."""

    @model_validator(mode="before")
    @classmethod
    def _a_text_is_a_path(cls, value: Any) -> Any:
        return {"path": value} if isinstance(value, str) else value


class DataConfig(Section):
    """Where text comes from. Paths are jsonl or parquet files or folders of them, local or as URIs (s3://, gs://, file://, …), or hub names as
    "hub:owner/name[:split]"."""

    source: Literal["embedded", "responses", "scenarios"] = "embedded"
    """`embedded`: the world above. `responses`: named models' responses with gold scores, from which the four scenarios are built.
    `scenarios`: ready-made train / in_domain / … files (pairs, or K completions with gold scores)."""
    responses: list[str] = []
    """source = "responses": rows with prompt, model, completion, gold_score; files only, no hub names."""
    unseen_models: list[str] = []
    """source = "responses": response models held out for the response-disjoint and mutual-disjoint sets."""
    validation_prompt_fraction: float = Field(default=0.18, gt=0, lt=1)
    """source = "responses": share of prompts held out (paper: 11,082 of 62,282)."""
    train: list[WeightedPath] = []
    """Pairs, or rankings, of which every two completions with different scores become a pair. Paths, or tables { path = "…", weight = 2.0 }."""
    in_domain: list[str] = []
    prompt_disjoint: list[str] = []
    response_disjoint: list[str] = []
    mutual_disjoint: list[str] = []
    sft: list[str] = []
    """Demonstrations: prompt and completion, or messages. Needed unless sft.enabled = false or the source is embedded."""
    rloo_prompts: list[str] = []
    """Rows with a prompt (text or messages). RLOO needs them unless the source is embedded; a run that only trains a reward model does not."""
    max_dropped_fraction: float = Field(default=0.01, ge=0, le=1)
    """The run fails when a larger share of a source's rows is malformed. Over-long, identical and tied pairs are counted apart and do not fail it."""
    max_prompt_tokens: int = Field(default=96, ge=4)
    overlong: Overlong = Overlong.DROP
    """What becomes of a pair, ranking or demonstration with a longer prompt: `drop`, or `truncate_prompt_left`, which cuts the prompt's oldest tokens
    but never its begin-of-sequence token and its assistant header. Both are counted. Longer prompts of rloo_prompts are always dropped."""
    max_completion_tokens: int = Field(default=96, ge=2)
    """Longer completions (end-of-turn token included) are dropped and counted."""
    task_resources: dict[str, float] = {}
    """Custom Ray resources, as named in cluster.yaml, of each task of Ray Data that reads, tokenises or writes; beside its one CPU."""

    @model_validator(mode="after")
    def _sources_are_named(self) -> Self:
        needed: dict[str, dict[str, Sequence[object]]] = {
            "embedded": {},
            "responses": {"responses": self.responses, "unseen_models": self.unseen_models},
            "scenarios": {"train": self.train, "in_domain": self.in_domain},
        }
        empty = [f"data.{name}" for name, values in needed[self.source].items() if not values]
        if empty:
            raise ValueError(f'data.source = "{self.source}" needs {" and ".join(empty)}, which must not be empty')
        return self


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
            raise ValueError(f"model.hidden_size = {self.hidden_size} over num_heads = {self.num_heads} must be a multiple of 32 per head (vLLM's CPU kernels)")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"model.num_heads = {self.num_heads} must be a multiple of model.num_kv_heads = {self.num_kv_heads}")
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
    evaluation_sets: tuple[Literal["in_domain", "prompt_disjoint", "response_disjoint", "mutual_disjoint"], ...] = ("in_domain",)
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
            raise ValueError('reward_model.preset = "released_code" has bsr_scale = "pairs", and bsr_scale = "none" is set; remove one of them')
        if values.get("bsr_scope", BsrScope.MICRO) != BsrScope.MICRO:
            raise ValueError('reward_model.preset = "released_code" has bsr_scope = "micro", and bsr_scope = "step" is set; remove one of them')
        return {**values, "bsr_scope": BsrScope.MICRO}

    @model_validator(mode="after")
    def _twins_differ(self) -> Self:
        if self.bt_twin and self.objective is Objective.BRADLEY_TERRY:
            raise ValueError('reward_model.bt_twin = true with objective = "bt" would train the same model twice; choose another objective, or leave it out')
        return self

    def as_bt_twin(self) -> "RewardModelConfig":
        """The same training with the Bradley-Terry objective, without what other objectives read."""
        own = {"objective", "bt_twin", *_READ_BY}
        return RewardModelConfig(objective=Objective.BRADLEY_TERRY, **{name: getattr(self, name) for name in type(self).model_fields if name not in own})

    @model_validator(mode="after")
    def _every_worker_has_a_pair(self) -> Self:
        _check_workers("reward_model", self.batch_size, self.workers, self.strategy)
        return self

    @model_validator(mode="after")
    def _best_metric_is_evaluated(self) -> Self:
        known = [f"{name}_accuracy" for name in self.evaluation_sets]
        if self.best_metric is not None and self.best_metric not in known:
            raise ValueError(f'reward_model.best_metric = "{self.best_metric}" is not evaluated; choose from {known}, or add to evaluation_sets')
        if self.early_stopping_evaluations is not None and self.best_metric is None:
            raise ValueError("reward_model.early_stopping_evaluations needs reward_model.best_metric, the metric to wait for")
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
            raise ValueError('reward_model.objective = "hinge" needs reward_model.margin > 0 (with 0 it stops learning as soon as a pair is ordered)')
        if self.bsr_scope is BsrScope.MICRO:
            if self.bsr_micro_pairs is None:
                raise ValueError('reward_model.bsr_scope = "micro" needs reward_model.bsr_micro_pairs, the pairs of a block')
            for num_workers in range(self.workers.fewest, self.workers.num_workers + 1):
                if self.batch_size % (num_workers * self.bsr_micro_pairs):
                    raise ValueError(
                        f"reward_model.batch_size = {self.batch_size} must be a multiple of workers.num_workers x bsr_micro_pairs = "
                        f"{num_workers} x {self.bsr_micro_pairs}, so that every block is full"
                    )
        elif self.bsr_micro_pairs is not None:
            raise ValueError('reward_model.bsr_micro_pairs is read only with bsr_scope = "micro"')
        return self


class EvaluationConfig(Section):
    """The four scenarios."""

    max_prompts_per_scenario: int | None = Field(default=None, ge=1)
    """None: all. Otherwise the first so many, in the order of their ids."""
    max_tokens_per_batch: int = Field(default=8192, ge=64)
    num_cpus: float = Field(default=1, ge=0)
    num_gpus: float = Field(default=0, ge=0)
    resources: dict[str, float] = {}


class ReplicaConfig(Section):
    """One served model: its replicas, and what they are asked at a time."""

    num_replicas: int = Field(default=1, ge=1)
    """Replicas that are always up."""
    max_replicas: int | None = Field(default=None, ge=1)
    """While batches queue, more are started, up to this many. None: never more than `num_replicas`."""
    upscale_delay_s: float = Field(default=10, ge=0)
    downscale_delay_s: float = Field(default=300, ge=0)
    num_threads: int = Field(default=1, ge=1)
    num_cpus: float = Field(default=0.5, ge=0)
    num_gpus: float = Field(default=0, ge=0)
    resources: dict[str, float] = {}
    dtype: Literal["float32", "bfloat16"] = "float32"
    max_length_tokens: int = Field(default=256, ge=2)
    """Prompt + completion; longer inputs are refused with 413."""
    max_batch_tokens: int = Field(default=2048, ge=1)
    """Tokens of one forward; a longer input has one of its own. 2,048 keeps a small model's activations in a CPU's cache; GPUs want more."""
    share_prompts: bool = True
    """Compute a prompt once for all the requests of a batch that have it."""

    @model_validator(mode="after")
    def _scales_up(self) -> Self:
        if self.max_replicas is not None and self.max_replicas < self.num_replicas:
            raise ValueError(f"max_replicas = {self.max_replicas} is less than num_replicas = {self.num_replicas}; raise it, or leave it out")
        return self


class ServeConfig(Section):
    """The scorers of a run: the proxy reward model and the gold judge."""

    gold: str = "embedded"
    """`embedded`: the world's own judge; a committed reward-model checkpoint directory; or the http(s) URL of a scoring service, whose first model
    is asked with the key in RM_ROBUST_API_KEY."""
    proxy_replica: ReplicaConfig = ReplicaConfig()
    gold_replica: ReplicaConfig = ReplicaConfig()
    request_timeout_s: float = Field(default=60, gt=0)

    @property
    def gold_url(self) -> str | None:
        return self.gold if self.gold.startswith(("http://", "https://")) else None


class TrackingConfig(Section):
    """Experiment trackers beside metrics.jsonl and TensorBoard, which are always written. They need the extra `trackers`."""

    wandb_project: str | None = None
    """Weights & Biases project; account and server as wandb itself is configured (WANDB_API_KEY, WANDB_MODE=offline, …)."""
    mlflow_experiment: str | None = None
    mlflow_uri: str | None = None
    """MLflow tracking server; None: as mlflow itself is configured (MLFLOW_TRACKING_URI)."""

    @model_validator(mode="after")
    def _uri_has_an_experiment(self) -> Self:
        if self.mlflow_uri and not self.mlflow_experiment:
            raise ValueError("tracking.mlflow_uri is not read without tracking.mlflow_experiment; set both, or neither")
        return self


class PipelineConfig(Section):
    """A whole run. `name` is the run directory's name."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    seed: int = Field(default=0, ge=0, lt=2**31)
    world: WorldConfig = WorldConfig()
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    sft: SftConfig = SftConfig()
    reward_model: RewardModelConfig = RewardModelConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    serve: ServeConfig = ServeConfig()
    rloo: RlooConfig = RlooConfig()
    tracking: TrackingConfig = TrackingConfig()

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        longest = self.data.max_prompt_tokens + self.data.max_completion_tokens
        if self.model.path is None and longest > self.model.max_position_embeddings:
            raise ValueError(
                f"data.max_prompt_tokens + data.max_completion_tokens = {longest} exceeds model.max_position_embeddings = {self.model.max_position_embeddings}"
            )
        served = min(self.serve.proxy_replica.max_length_tokens, self.serve.gold_replica.max_length_tokens)
        if self.data.max_prompt_tokens + self.rloo.max_new_tokens + 1 > served:
            raise ValueError(
                f"data.max_prompt_tokens + rloo.max_new_tokens + 1 = {self.data.max_prompt_tokens + self.rloo.max_new_tokens + 1} exceeds the served "
                f"max_length_tokens = {served}: RLOO could sample completions that the scorers refuse"
            )
        if not self.sft.enabled and self.model.path is None:
            raise ValueError("sft.enabled = false needs model.path: there is no model to start from")
        if self.data.source != "embedded":
            if self.sft.enabled and not self.data.sft:
                raise ValueError("sft.enabled = true needs data.sft, which is empty")
            if self.data.rloo_prompts and self.serve.gold == "embedded":
                raise ValueError('serve.gold = "embedded" judges only the embedded world; set serve.gold to a reward-model checkpoint directory')
        return self
