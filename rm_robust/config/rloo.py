"""Every setting of the RLOO stage."""

from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from rm_robust.config.shared import ComputeConfig, OptimizerConfig, Section, StrategyConfig, WorkersConfig


class RewardSourceConfig(Section):
    """One more reward beside the proxy reward model: a scoring service elsewhere, or a rule."""

    name: str = Field(pattern=r"^[a-z][a-z0-9_]*$")
    """In metrics: rloo/reward/<name>_mean. `proxy` and `gold` are taken."""
    weight: float = 1.0
    """The step's reward is the proxy's, times `proxy_weight`, plus the sum of weight * score over these."""
    url: str | None = None
    """http(s) URL of a scoring service, whose first model is asked with the key in RM_ROBUST_API_KEY."""
    function: str | None = None
    """`package.module:function`, called as function(prompt: list[Message], completion: str) -> float in the driver."""

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        if (self.url is None) == (self.function is None):
            raise ValueError(
                f"reward source {self.name!r}: set either url or function, got url = {self.url!r} and function = {self.function!r}"
            )
        if self.name in ("proxy", "gold"):
            raise ValueError(
                f"a reward source may not be called {self.name!r}; that is the reward model's or the judge's own name"
            )
        return self


class MonitorConfig(Section):
    """When a run is over-optimised: over a window the proxy score rises while the gold score does not, or falls (Gao et al. 2023)."""

    window_steps: int = Field(default=20, ge=4)
    """Steps with a gold score that are looked at."""
    min_proxy_rise: float = Field(default=0.25, gt=0)
    """Of the proxy's mean from the first half of the window to the second, in standard deviations of the first step's proxy scores."""
    max_gold_rise: float = 0.0
    """Fires when the gold mean rose by no more than this, in standard deviations of the first step's gold scores."""
    min_gold_fall: float = Field(default=0.15, gt=0)
    """Of the gold mean likewise; fires with any rise of the proxy."""
    action: Literal["warn", "lower_learning_rate", "stop"] = "warn"
    learning_rate_factor: float = Field(default=0.5, gt=0, lt=1)
    """action = "lower_learning_rate" only: each firing multiplies the rate of all later steps by it."""


class PolicyEvaluationConfig(Section):
    """The policy against the SFT policy on held prompts."""

    every_steps: int = Field(default=20, ge=0)
    """0: never. Otherwise also before the first step and after the last one."""
    num_prompts: int = Field(default=64, ge=2)
    """Held out of the RLOO prompts; no step samples from them."""


class RlooConfig(Section):
    """REINFORCE leave-one-out against the served reward model."""

    num_steps: int = Field(default=60, ge=1)
    num_prompts_per_step: int = Field(default=32, ge=1)
    num_completions_per_prompt: int = Field(default=4)
    """K; at least 2, or there is no baseline."""
    temperature: float = Field(default=1.0, gt=0)
    max_new_tokens: int = Field(default=64, ge=1)
    proxy_weight: float = 1.0
    """Of the proxy's score in the reward; 0 trains on `reward_sources` alone."""
    reward_sources: tuple[RewardSourceConfig, ...] = ()
    max_failed_score_fraction: float = Field(default=0.2, ge=0, lt=1)
    """Completions of a step whose score failed or is not finite are left out of baseline and update, and counted; with more of them the run ends."""
    normalise_scores: bool = False
    """Reward scores of a step minus their mean, over their standard deviation, before clipping, KL and baseline."""
    score_clip_range: tuple[float, float] | None = None
    """Reward scores are clamped to it before KL and baseline (TRL's reward_clip_range)."""
    kl_coefficient: float = Field(default=0.05, ge=0)
    """beta; reward = score - beta * KL of the whole completion (nats). Paper: 0.05."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k1"
    """Of the KL to the SFT policy a token (Schulman 2020), summed over the completion."""
    kl_in_baseline: bool = True
    """True: the KL is part of the reward that the baseline is taken of (paper, TRL). False: subtracted from the advantage afterwards."""
    target_kl: float | None = Field(default=None, gt=0)
    """None: kl_coefficient stays. Otherwise it follows the mean KL of a completion towards this (Ziegler et al. 2019, section 2.2)."""
    kl_horizon_steps: float = Field(default=20, gt=0)
    """target_kl only: steps in which the coefficient changes by a factor of about e**0.2 at an error of 20 % or more."""
    ratio_level: Literal["sequence", "token"] = "sequence"
    """Of the clipped ratio new/old: of whole completions (paper, TRL), or token by token, averaged over a completion's tokens."""
    clip_range: float = Field(default=0.2, gt=0, lt=1)
    """The ratio is clipped to [1 - clip_range, 1 + clip_range]."""
    num_epochs_per_step: int = Field(default=1, ge=1)
    """Passes over a step's completions."""
    num_minibatches_per_epoch: int = Field(default=1, ge=1)
    """Optimiser steps of a pass; a prompt's completions stay together."""
    truncated_completions: Literal["penalty", "mask", "keep"] = "penalty"
    """Those cut at max_new_tokens. `penalty`: truncated_penalty is subtracted from their reward. `mask`: no gradient, but part of the baseline.
    `keep`: as any other."""
    truncated_penalty: float = Field(default=1.0, ge=0)
    """Score units; `penalty` only."""
    max_policy_lag: int = Field(default=0, ge=0)
    """Steps by which the policy that samples may be behind the one that is trained. 0: on-policy, one after the other. n: n more batches are sampled
    meanwhile."""
    importance_correction: Literal["none", "sequence", "token"] = "sequence"
    """Weight old/sampler (trainer's log-probabilities when the update starts, over vLLM's when it sampled), without gradient: corrects lag and engine
    mismatch."""
    importance_cap: float = Field(default=2.0, ge=1)
    """The weight is at most this (truncated importance sampling)."""
    gold_every_steps: int = Field(default=1, ge=1)
    """Steps whose completions the gold judge scores: the first, and then every n-th."""
    monitor: MonitorConfig = MonitorConfig()
    evaluation: PolicyEvaluationConfig = PolicyEvaluationConfig()
    generation_silence_s: float = Field(default=600, gt=0)
    """An engine that finishes no prompt for so long counts as lost, and is replaced."""
    max_restarts: int = Field(default=3, ge=0)
    """Of lost engines and trainers, without a committed step between them; then the run ends with an error."""
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=5e-4, warmup_fraction=0.05, schedule="constant")
    strategy: StrategyConfig = StrategyConfig()
    compute: ComputeConfig = ComputeConfig()
    trainers: WorkersConfig = WorkersConfig(num_workers=1, num_threads_per_worker=2)
    max_tokens_per_micro_batch: int = Field(default=8192, ge=64)
    num_engines: int = Field(default=1, ge=1)
    engine_num_cpus: float = Field(default=0.5, ge=0)
    engine_num_gpus: float = Field(default=0, ge=0)
    engine_num_threads: int = Field(default=2, ge=1)
    engine_resources: dict[str, float] = {}
    engine_dtype: Literal["float32", "bfloat16"] = "float32"
    tensor_parallel_size: int = Field(default=1, ge=1)
    kv_cache_memory_bytes: int = Field(default=64 * 2**20, ge=2**20)
    """CPU engines only."""
    max_num_sequences: int = Field(default=128, ge=1)
    weight_transfer_backend: Literal["gloo", "nccl"] = "gloo"
    checkpoint_every_steps: int = Field(default=10, ge=1)
    num_sample_prompts: int = Field(default=4, ge=0)
    """Prompts whose completions are kept for the report at every checkpoint."""

    @field_validator("num_completions_per_prompt")
    @classmethod
    def _baseline_exists(cls, value: int) -> int:
        if value < 2:
            raise ValueError(
                f"RLOO needs at least 2 completions per prompt to form a baseline, got {value}. Set rloo.num_completions_per_prompt >= 2"
            )
        return value

    @model_validator(mode="after")
    def _levels_fit(self) -> Self:
        if self.importance_correction == "token" and self.ratio_level != "token":
            raise ValueError(
                'rloo.importance_correction = "token" weights tokens; set rloo.ratio_level = "token" too, or use "sequence"'
            )
        if self.evaluation.every_steps and self.evaluation.num_prompts < self.trainers.num_workers:
            raise ValueError(
                f"rloo.evaluation.num_prompts = {self.evaluation.num_prompts} leaves some of the {self.trainers.num_workers} trainers idle; raise it"
            )
        return self

    @model_validator(mode="after")
    def _devices_match(self) -> Self:
        if self.weight_transfer_backend == "nccl" and not (self.engine_num_gpus and self.trainers.num_gpus_per_worker):
            raise ValueError(
                'rloo.weight_transfer_backend = "nccl" needs GPUs on both sides; set engine_num_gpus and trainers.num_gpus_per_worker, or use "gloo"'
            )
        if self.trainers.min_workers is not None:
            raise ValueError(
                "rloo.trainers.min_workers is not read: RLOO replaces a lost trainer, and waits for it; leave it out"
            )
        if self.num_prompts_per_step % (self.num_minibatches_per_epoch * self.trainers.num_workers):
            raise ValueError(
                f"rloo.num_prompts_per_step = {self.num_prompts_per_step} must be a multiple of num_minibatches_per_epoch * trainers.num_workers = "
                f"{self.num_minibatches_per_epoch * self.trainers.num_workers}, so that each has whole groups"
            )
        return self
