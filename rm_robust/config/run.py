"""Every setting of a run with its default, bound and unit: a class for each stage, here and in the files beside this.

A config is frozen. Unknown keys and combinations that cannot work are refused here, before Ray starts.
rm_robust/config/loading.py reads config files and overrides.
"""

from collections.abc import Iterator
from typing import Literal, Self

from pydantic import Field, model_validator

from rm_robust.config.data import DataConfig, WorldConfig
from rm_robust.config.rloo import RlooConfig
from rm_robust.config.shared import Section, WhereItRuns
from rm_robust.config.training import ModelConfig, RewardModelConfig, SftConfig


class EvaluationConfig(Section):
    """Settings of the evaluation on the four scenarios."""

    max_prompts_per_scenario: int | None = Field(default=None, ge=1)
    """Prompts of a scenario that are evaluated: the first in the order of their ids. None: all."""
    max_tokens_per_batch: WhereItRuns[int] = Field(default=8192, ge=64)
    """Largest number of tokens (padding included) of one forward pass; a longer group has a pass of its own. It changes
    memory and speed, not the scores."""
    num_cpus: WhereItRuns[float] = Field(default=1, ge=0)
    """CPUs that Ray sets aside for the evaluation."""
    num_gpus: WhereItRuns[float] = Field(default=0, ge=0)
    """GPUs that Ray sets aside for the evaluation. 0: it computes on the CPU."""
    resources: WhereItRuns[dict[str, float]] = {}
    """Custom Ray resources of the evaluation, as named in cluster.yaml."""


class ReplicaConfig(Section):
    """One served model: its replicas, and how much they compute at a time."""

    num_replicas: WhereItRuns[int] = Field(default=1, ge=1)
    """Number of replicas that are always up."""
    max_replicas: WhereItRuns[int | None] = Field(default=None, ge=1)
    """Largest number of replicas, at least `num_replicas`; more are started while batches queue. None: never more than
    `num_replicas`."""
    upscale_delay_s: WhereItRuns[float] = Field(default=10, ge=0)
    """Seconds for which batches must queue before a replica is added (max_replicas only)."""
    downscale_delay_s: WhereItRuns[float] = Field(default=300, ge=0)
    """Seconds for which replicas must have too little to do before one is removed (max_replicas only)."""
    num_threads: WhereItRuns[int] = Field(default=1, ge=1)
    """Threads that torch uses on the CPU in one replica."""
    num_cpus: WhereItRuns[float] = Field(default=0.5, ge=0)
    """CPUs that Ray sets aside for one replica. They decide how many replicas a node takes, not how many threads
    compute."""
    num_gpus: WhereItRuns[float] = Field(default=0, ge=0)
    """GPUs that Ray sets aside for one replica. 0: it computes on the CPU."""
    resources: WhereItRuns[dict[str, float]] = {}
    """Custom Ray resources of one replica, as named in cluster.yaml."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Number format of the weights. Scores are always float32."""
    max_length_tokens: int = Field(default=256, ge=2)
    """Largest number of tokens of prompt and completion together. Longer inputs are refused with 413. RLOO's scorers
    must take data.max_prompt_tokens + rloo.max_new_tokens + 1."""
    max_batch_tokens: WhereItRuns[int] = Field(default=2048, ge=1)
    """Tokens of one forward pass. A longer input has a pass of its own. 2,048 keeps a small model's activations in a
    CPU's cache; GPUs need more."""
    share_prompts: WhereItRuns[bool] = True
    """Compute a prompt once for all requests of a batch that have it."""

    @model_validator(mode="after")
    def _scales_up(self) -> Self:
        if self.max_replicas is not None and self.max_replicas < self.num_replicas:
            raise ValueError(
                f"max_replicas = {self.max_replicas} is less than num_replicas = {self.num_replicas}; "
                "raise it, or leave it out"
            )
        return self


class ServeConfig(Section):
    """The scorers of a run: the proxy reward model and the gold judge."""

    gold: str = "embedded"
    """`embedded`: the world's own judge. Otherwise a committed reward-model checkpoint directory, or the http(s) URL of
    a scoring service, whose first model is asked with the key in RM_ROBUST_API_KEY."""
    proxy_replica: ReplicaConfig = ReplicaConfig()
    """Replicas of the proxy, the reward model that RLOO maximises."""
    gold_replica: ReplicaConfig = ReplicaConfig()
    """Replicas of the judge. They are not started where `gold` is a URL."""
    request_timeout_s: WhereItRuns[float] = Field(default=60, gt=0)
    """Seconds after which a request that has no scores counts as failed."""

    @property
    def gold_url(self) -> str | None:
        return self.gold if self.gold.startswith(("http://", "https://")) else None


class TrackingConfig(Section):
    """Experiment trackers, which need the extra `trackers`. metrics.jsonl and TensorBoard are always written."""

    wandb_project: WhereItRuns[str | None] = None
    """Weights & Biases project. Account and server are those that wandb itself is configured with (WANDB_API_KEY,
    WANDB_MODE=offline, …). None: nothing is sent there."""
    mlflow_experiment: WhereItRuns[str | None] = None
    """MLflow experiment. None: nothing is sent to MLflow."""
    mlflow_uri: WhereItRuns[str | None] = None
    """MLflow tracking server (with mlflow_experiment only). None: the one that mlflow itself is configured with
    (MLFLOW_TRACKING_URI)."""

    @model_validator(mode="after")
    def _uri_has_an_experiment(self) -> Self:
        if self.mlflow_uri and not self.mlflow_experiment:
            raise ValueError("tracking.mlflow_uri is not read without tracking.mlflow_experiment; set both, or neither")
        return self


class PipelineConfig(Section):
    """The config of a whole run. `name` is the name of its run directory."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name of the run, and of its directory below runs/ where --run-dir names no other."""
    seed: int = Field(default=0, ge=0, lt=2**31)
    """Seed of everything random: the embedded world, the split of the prompts, first weights, order of batches,
    sampling."""
    world: WorldConfig = WorldConfig()
    """Data of a run that has none of its own."""
    data: DataConfig = DataConfig()
    """What the stages train and test on."""
    model: ModelConfig = ModelConfig()
    """What the stages start from."""
    sft: SftConfig = SftConfig()
    """First training stage."""
    reward_model: RewardModelConfig = RewardModelConfig()
    """Second training stage."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """Test of the reward model."""
    serve: ServeConfig = ServeConfig()
    """Scoring during RLOO."""
    rloo: RlooConfig = RlooConfig()
    """Last training stage."""
    kept_states: WhereItRuns[Literal["growable", "all"]] = "growable"
    """Training states that stay when their stage is committed. `growable`: those of stages whose num_steps or
    num_epochs a resumed run may raise, which are stages with optimizer.schedule = "constant". `all`: every last
    state."""
    tracking: TrackingConfig = TrackingConfig()
    """Metrics outside of the run directory."""

    def may_grow(self, stage: str) -> bool:
        """Return whether more steps of a training stage leave the learning rates of its first steps as they are."""
        optimizers = {
            "sft": self.sft.optimizer,
            "reward_model": self.reward_model.optimizer,
            "rloo": self.rloo.optimizer,
        }
        return optimizers[stage].schedule == "constant"

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        """Refuse combinations that cannot work, all of them at once: mending one must not lead to the next."""
        problems = [*self._lengths_that_do_not_fit(), *self._missing_parts()]
        if problems:
            raise ValueError("\n  ".join(problems))
        return self

    def _lengths_that_do_not_fit(self) -> Iterator[str]:
        longest = self.data.max_prompt_tokens + self.data.max_completion_tokens
        if self.model.path is None and longest > self.model.max_position_embeddings:
            yield (
                f"data.max_prompt_tokens + data.max_completion_tokens = {longest} exceeds "
                f"model.max_position_embeddings = {self.model.max_position_embeddings} of the model from scratch; "
                f"set model.max_position_embeddings = {longest}, or name a model with model.path"
            )

    def _missing_parts(self) -> Iterator[str]:
        if not self.sft.enabled and self.model.path is None:
            yield (
                "sft.enabled = false needs model.path: there is no model to start from; name one, or leave both out "
                "and name demonstrations in data.sft, from which a small model is made"
            )
        if self.data.source == "prompts" and self.rloo.proxy is None:
            yield (
                'data.source = "prompts" has no preferences to train a reward model on; set rloo.proxy to one that '
                "exists already, or name preferences with another data.source"
            )
        if self.data.source != "embedded" and self.sft.enabled and not self.data.sft:
            yield (
                "sft.enabled = true needs data.sft, which is empty; name demonstrations, or pairs, whose chosen "
                "completions are imitated (the files of data.train may be named again)"
            )
        if self.data.source != "embedded" and self.data.rloo_prompts and self.serve.gold == "embedded":
            yield (
                'serve.gold = "embedded" judges only the embedded world; set serve.gold to a reward-model checkpoint '
                "directory"
            )
