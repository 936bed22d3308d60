"""Every setting of the RLOO stage."""

import re
from collections.abc import Mapping
from typing import Literal, Self
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

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


class RewardSourceConfig(Section):
    """A reward beside that of the proxy reward model: a scoring service elsewhere, or a rule."""

    name: str = Field(pattern=r"^[a-z][a-z0-9_]*$")
    """Name of the source in the metrics: `rloo/reward/<name>_mean`. `proxy` and `gold` are taken."""
    weight: float = 1.0
    """Factor of the source's score. The reward score of a completion is `proxy_weight` times the proxy's score plus the
    sum of weight * score over all sources."""
    url: str | None = None
    """http(s) URL of a scoring service. Its first model is asked, with the key in RM_ROBUST_API_KEY. Either url or
    function must be set, and not both."""
    function: str | None = None
    """`package.module:function`, which the driver calls. A function with a parameter `completions` is called as TRL
    calls it, function(prompts=…, completions=…, completion_ids=…, trainer_state=…, **columns) -> list of scores; any
    other as function(prompt: list[Message], completion: str) -> score, with the columns that it names. It may be async,
    and None instead of a score abstains. docs/trainer/policy.md has the details."""
    num_concurrent_calls: WhereItRuns[int | None] = Field(default=None, ge=1)
    """Most calls (requests to a url) at the same time. A function for whole lists gets as many lists of whole prompts.
    Above 1 the function must be safe to call from several threads, unless it is async. None: 1 for a function, 8 for a
    url."""
    timeout_s: WhereItRuns[float] = Field(default=60, gt=0)
    """Seconds after which a call of the function, or one attempt of a request, counts as failed."""
    num_retries: WhereItRuns[int | None] = Field(default=None, ge=0, le=100)
    """Further attempts after a call that raised or did not answer in time. None: 0 for a function; 18 for a url, with
    growing pauses."""

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        if (self.url is None) == (self.function is None):
            raise ValueError(
                f"reward source {self.name!r}: set either url or function, "
                f"got url = {self.url!r} and function = {self.function!r}"
            )
        if self.name in ("proxy", "gold"):
            raise ValueError(
                f"a reward source may not be called {self.name!r}; that is the reward model's or the judge's own name"
            )
        if self.url is not None and not is_web_address(self.url):
            raise ValueError(
                f"reward source {self.name!r}: url = {self.url!r} is no address of a service; write it as "
                "http://host:port or https://host"
            )
        return self


def is_web_address(url: str) -> bool:
    """Return whether a text is the address of a service: http or https, a host, and a port that can be one."""
    try:
        parts = urlsplit(url)
        is_port = parts.port is None or parts.port > 0  # `port` raises ValueError when it is none
    except ValueError:
        return False
    return parts.scheme in ("http", "https") and bool(parts.hostname) and is_port and not re.search(r"\s", url)


class MonitorConfig(Section):
    """The rule by which a run counts as over-optimised: in a window of steps the proxy rises, and gold stays or falls.

    Source: Gao et al. 2023. rm_robust/rloo/monitor.py has the rule.
    """

    window_steps: int = Field(default=20, ge=4)
    """Length of the window, in steps with a gold score."""
    min_proxy_rise: float = Field(default=0.25, gt=0)
    """Smallest rise of the proxy's mean from the first half of the window to the second at which the monitor may fire,
    in standard deviations of the first step's proxy scores."""
    max_gold_rise: float = 0.0
    """The monitor fires when the proxy's mean has risen by `min_proxy_rise` and the gold mean by no more than this, in
    standard deviations of the first step's gold scores."""
    min_gold_fall: float = Field(default=0.15, gt=0)
    """Smallest fall of the gold mean, in standard deviations of the first step's gold scores, at which the monitor
    fires however little the proxy has risen."""
    action: Literal["warn", "lower_learning_rate", "stop"] = "warn"
    """What a firing does beside its warning in the log. `warn`: nothing. `lower_learning_rate`: the learning rate is
    multiplied by learning_rate_factor. `stop`: the run ends at this step, with its last policy."""
    learning_rate_factor: float = Field(default=0.5, gt=0, lt=1)
    """Each firing multiplies the learning rate of all later steps by this (action = "lower_learning_rate" only)."""


class PolicyEvaluationConfig(Section):
    """How the policy is compared with the SFT policy on held-out prompts."""

    every_steps: int = Field(default=20, ge=0)
    """Steps between two comparisons. 0: never. Otherwise there is also one before the first step and one after the
    last."""
    num_prompts: int = Field(default=64, ge=2)
    """Number of RLOO prompts that are held out; no step samples from them. It must be at least trainers.num_workers."""


class RlooConfig(Section):
    """Settings of REINFORCE leave-one-out against the served reward model."""

    proxy: str | None = Field(default=None, min_length=1)
    """A reward model that exists already: a committed checkpoint directory, a run directory (its reward model), either
    also as a URI in an object store, or the http(s) URL of a scoring service, whose first model is asked. The run then
    trains no reward model, and keeps to this one when it resumes. None: the run's own reward model."""
    proxy_template: Literal["same", "own"] = "same"
    """`same`: the chat template of `proxy` must be the policy's. `own`: it may be another one; the proxy gets the texts
    of prompt and completion, and applies its own template (proxy only)."""
    num_steps: MayGrow[int] = Field(default=60, ge=1)
    """Number of steps. A step samples completions, scores them and updates the policy."""
    num_prompts_per_step: int = Field(default=32, ge=1)
    """Number of prompts of a step. It must be a multiple of num_minibatches_per_epoch * trainers.num_workers."""
    num_completions_per_prompt: int = Field(default=4)
    """K, the number of completions of a prompt. It is at least 2, because a single completion has no baseline."""
    temperature: float = Field(default=1.0, gt=0)
    """Temperature at which completions are sampled, and at which the trainer computes probabilities and KL. 1 is the
    model's own distribution."""
    max_new_tokens: int = Field(default=64, ge=1)
    """Largest number of tokens of a completion; a longer one is cut (truncated_completions). data.max_prompt_tokens +
    this + 1 must not exceed max_length_tokens of serve.proxy_replica and serve.gold_replica."""
    proxy_weight: float = 1.0
    """Factor of the proxy's score in the reward. 0 trains on `reward_sources` alone."""
    reward_sources: tuple[RewardSourceConfig, ...] = ()
    """Rewards beside the proxy's: other scoring services, and rules."""
    max_failed_score_fraction: float = Field(default=0.2, ge=0, lt=1)
    """Largest share of a step's completions whose score may fail or be non-finite; the run ends when there are more.
    Such completions are left out of baseline and update, and counted."""
    normalise_scores: bool = False
    """Subtract the mean of a step's reward scores and divide by their standard deviation, before clipping, KL and
    baseline."""
    score_clip_range: tuple[float, float] | None = None
    """Lowest and highest reward score; others are clamped to them, before KL and baseline (TRL's reward_clip_range).
    None: no score is clamped."""
    kl_coefficient: float = Field(default=0.05, ge=0)
    """beta in reward = score - beta * KL of the whole completion (nats). Paper: 0.05."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k1"
    """Estimator of a token's KL to the SFT policy (Schulman 2020). The KL of a completion is the sum over its
    tokens."""
    kl_in_baseline: bool = True
    """True: the KL is part of the reward from which the baseline is computed (paper, TRL). False: it is subtracted from
    the advantage afterwards."""
    target_kl: float | None = Field(default=None, gt=0)
    """Mean KL of a completion towards which kl_coefficient is adapted (Ziegler et al. 2019, section 2.2). None:
    kl_coefficient stays as it is."""
    kl_horizon_steps: float = Field(default=20, gt=0)
    """Steps in which kl_coefficient changes by a factor of about `e**0.2` at an error of 20 % or more (target_kl
    only)."""
    ratio_level: Literal["sequence", "token"] = "sequence"
    """Level of the clipped ratio new/old: one for a whole completion (paper, TRL), or one for each token, averaged over
    the completion's tokens."""
    clip_range: float = Field(default=0.2, gt=0, lt=1)
    """The ratio is clipped to [1 - clip_range, 1 + clip_range]."""
    num_epochs_per_step: int = Field(default=1, ge=1)
    """Passes over a step's completions."""
    num_minibatches_per_epoch: int = Field(default=1, ge=1)
    """Optimiser steps of one pass. The completions of a prompt stay together."""
    truncated_completions: Literal["penalty", "mask", "keep"] = "penalty"
    """What happens to completions that are cut at max_new_tokens. `penalty`: truncated_penalty is subtracted from their
    reward. `mask`: they have no gradient, but are part of the baseline. `keep`: they are treated as any other."""
    truncated_penalty: float = Field(default=1.0, ge=0)
    """Score units that are subtracted from the reward of a cut completion (truncated_completions = "penalty" only)."""
    max_policy_lag: int = Field(default=0, ge=0)
    """Steps by which the sampling policy may be behind the trained one. 0: on-policy, sampling and training take turns.
    n: n further batches are sampled during training."""
    importance_correction: Literal["none", "sequence", "token"] = "sequence"
    """Level of the weight old/sampler, which corrects policy lag and differences between the engines. The weight is the
    trainer's probability when the update starts, divided by vLLM's when it sampled. It has no gradient. `token` needs
    ratio_level = "token"; `none` leaves the weight out."""
    importance_cap: float = Field(default=2.0, ge=1)
    """Upper bound of the weight of importance_correction (truncated importance sampling)."""
    gold_every_steps: int = Field(default=1, ge=1)
    """The gold judge scores the completions of the first step, and then of every n-th step."""
    monitor: MonitorConfig = MonitorConfig()
    """Watch for over-optimisation."""
    evaluation: PolicyEvaluationConfig = PolicyEvaluationConfig()
    """Test of the policy on held-out prompts."""
    generation_silence_s: WhereItRuns[float] = Field(default=600, gt=0)
    """Seconds after which an engine that has finished no prompt counts as lost, and is replaced."""
    max_restarts: WhereItRuns[int] = Field(default=3, ge=0)
    """Most restarts of lost engines and trainers without a committed step between them. If one more is needed, the run
    ends with an error."""
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=5e-4, warmup_fraction=0.05, schedule="constant")
    """How the policy's weights are updated."""
    strategy: StrategyConfig = StrategyConfig()
    """What each trainer holds of the policy."""
    compute: ComputeConfig = ComputeConfig()
    """Number format and memory of the training."""
    trainers: WorkersConfig = WorkersConfig(num_workers=1, num_threads_per_worker=2)
    """Workers that train the policy."""
    max_tokens_per_micro_batch: WhereItRuns[int] = Field(default=8192, ge=64)
    """Largest number of tokens (padding included) of one forward and backward pass of a trainer; a longer group has a
    pass of its own. It changes memory and speed, not the gradient."""
    num_engines: WhereItRuns[int] = Field(default=1, ge=1)
    """Number of vLLM engines that sample completions side by side."""
    engine_num_cpus: WhereItRuns[float] = Field(default=0.5, ge=0)
    """CPUs that Ray sets aside for one engine. They decide how many engines a node takes, not how many threads
    compute."""
    engine_num_gpus: WhereItRuns[float] = Field(default=0, ge=0)
    """GPUs that Ray sets aside for one engine. 0: the engine computes on the CPU."""
    engine_num_threads: WhereItRuns[int] = Field(default=2, ge=1)
    """Threads of one engine on the CPU."""
    engine_resources: WhereItRuns[dict[str, float]] = {}
    """Custom Ray resources of one engine, as named in cluster.yaml."""
    engine_dtype: Literal["float32", "bfloat16"] = "float32"
    """Number format of an engine's weights and computation. The trainer's weights stay float32."""
    tensor_parallel_size: WhereItRuns[int] = Field(default=1, ge=1)
    """Number of GPUs over which an engine splits every layer. It must be 1 on CPUs."""
    kv_cache_memory_bytes: WhereItRuns[int] = Field(default=64 * 2**20, ge=2**20)
    """Bytes of an engine's key-value cache on the CPU. On a GPU, vLLM takes its usual share of the memory."""
    max_num_sequences: WhereItRuns[int] = Field(default=128, ge=1)
    """Largest number of completions that an engine samples at the same time; the others wait in it."""
    weight_transfer_backend: WhereItRuns[Literal["gloo", "nccl"]] = "gloo"
    """How new weights reach the engines. `gloo`: over the network or shared memory of CPUs. `nccl`: from GPU to GPU; it
    needs engine_num_gpus and trainers.num_gpus_per_worker above 0."""
    checkpoint_every_steps: WhereItRuns[int] = Field(default=10, ge=1)
    """Steps between two committed training states. A stopped run resumes from the last one; the last step is always
    committed."""
    num_sample_prompts: WhereItRuns[int] = Field(default=4, ge=0)
    """Number of prompts whose completions are kept for the report at every checkpoint."""

    @field_validator("num_completions_per_prompt")
    @classmethod
    def _baseline_exists(cls, value: int) -> int:
        if value < 2:
            raise ValueError(
                f"RLOO needs at least 2 completions per prompt to form a baseline, got {value}. "
                "Set rloo.num_completions_per_prompt >= 2"
            )
        return value

    @model_validator(mode="after")
    def _there_is_a_reward(self) -> Self:
        names = [source.name for source in self.reward_sources]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(
                f"rloo.reward_sources has {', '.join(twice)} more than once; give each source its own name"
            )
        if not self.proxy_weight and not any(source.weight for source in self.reward_sources):
            raise ValueError(
                "rloo.proxy_weight = 0 leaves no reward: no source of rloo.reward_sources has a weight either; "
                "set one of them"
            )
        if self.score_clip_range is not None and self.score_clip_range[0] >= self.score_clip_range[1]:
            raise ValueError(
                f"rloo.score_clip_range = {list(self.score_clip_range)}: the lowest score must be below the highest; "
                "swap them"
            )
        return self

    @model_validator(mode="after")
    def _levels_and_held_out_prompts_fit(self) -> Self:
        if self.importance_correction == "token" and self.ratio_level != "token":
            raise ValueError(
                'rloo.importance_correction = "token" weights tokens; set rloo.ratio_level = "token" too, '
                'or use "sequence"'
            )
        if self.evaluation.every_steps and self.evaluation.num_prompts < self.trainers.num_workers:
            raise ValueError(
                f"rloo.evaluation.num_prompts = {self.evaluation.num_prompts} leaves some of the "
                f"{self.trainers.num_workers} trainers idle; raise it"
            )
        return self

    @model_validator(mode="after")
    def _proxy_settings_have_a_proxy(self) -> Self:
        if self.proxy_template != "same" and self.proxy is None:
            raise ValueError(
                f"rloo.proxy_template = {self.proxy_template!r} is not read without rloo.proxy; set both, or neither"
            )
        return self

    def held_on_resume(self) -> Mapping[str, str]:
        held = dict(super().held_on_resume())
        if self.strategy.kind == "deepspeed":
            held["trainers.num_workers"] = DEEPSPEED_STATE
        elif self.num_minibatches_per_epoch > 1:
            held["trainers.num_workers"] = "each trainer draws the minibatches of its own completions"
        return held

    @property
    def proxy_url(self) -> str | None:
        """The address of a proxy that somebody else serves; None for a checkpoint, and for the run's own one."""
        return self.proxy if self.proxy is not None and self.proxy.startswith(("http://", "https://")) else None

    @model_validator(mode="after")
    def _workers_fit(self) -> Self:
        if self.weight_transfer_backend == "nccl" and not (self.engine_num_gpus and self.trainers.num_gpus_per_worker):
            raise ValueError(
                'rloo.weight_transfer_backend = "nccl" needs GPUs on both sides; set engine_num_gpus and '
                'trainers.num_gpus_per_worker, or use "gloo"'
            )
        if self.trainers.min_workers is not None:
            raise ValueError(
                "rloo.trainers.min_workers is not read: RLOO replaces a lost trainer, and waits for it; leave it out"
            )
        if self.num_prompts_per_step % (self.num_minibatches_per_epoch * self.trainers.num_workers):
            raise ValueError(
                f"rloo.num_prompts_per_step = {self.num_prompts_per_step} must be a multiple of "
                "num_minibatches_per_epoch * trainers.num_workers = "
                f"{self.num_minibatches_per_epoch * self.trainers.num_workers}, so that each has whole groups"
            )
        return self
