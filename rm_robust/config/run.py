"""Every setting of a run, its default, its bound and its unit, one class per stage (RLOO's: config_rloo.py). Files and overrides: config_loading.py.

Frozen, and unknown keys are refused; combinations that cannot work are refused here, before Ray starts.
"""

from typing import Literal, Self

from pydantic import Field, model_validator

from rm_robust.config.data import DataConfig, WorldConfig
from rm_robust.config.rloo import RlooConfig
from rm_robust.config.shared import Section
from rm_robust.config.training import ModelConfig, RewardModelConfig, SftConfig


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
            raise ValueError(
                f"max_replicas = {self.max_replicas} is less than num_replicas = {self.num_replicas}; raise it, or leave it out"
            )
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
                raise ValueError(
                    'serve.gold = "embedded" judges only the embedded world; set serve.gold to a reward-model checkpoint directory'
                )
        return self
