"""The config of `rm-robust generate-responses`: response models, their sampling, and the scorer of responses."""

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from rm_robust.config.shared import Section


class ResponseModel(Section):
    """One model that responds to the prompts."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """The model's name in the scenarios (data.unseen_models); its folder has the same name."""
    path: str
    """Hugging Face directory or hub name of a causal language model whose tokenizer has a chat template."""
    temperature: float | None = Field(default=None, gt=0)
    """The sampling temperature; None takes that of [sampling]."""


class SamplingConfig(Section):
    """How each model samples one response to a prompt. The defaults are the paper's (GenerationArguments)."""

    temperature: float = Field(default=0.8, gt=0)
    """Sampling temperature of every model that has none of its own. 1 is a model's own distribution."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Probability mass of the most likely tokens from which a token is sampled. 1: all tokens."""
    max_new_tokens: int = Field(default=512, ge=1)
    """Largest number of tokens of a response; a longer one is cut, and counted. It must be less than
    engines.max_model_len."""


class EnginesConfig(Section):
    """The vLLM engines of one model. The models run one after the other."""

    num_engines: int = Field(default=1, ge=1)
    """Number of engines of a model, each of which answers prompts of its own."""
    num_cpus_per_engine: float = Field(default=1, ge=0)
    """CPUs that Ray sets aside for one engine. They decide how many engines a node takes, not how many threads
    compute."""
    num_gpus_per_engine: int = Field(default=0, ge=0)
    """GPUs of one engine. 0 runs on the CPU. Several hold a part of every layer each (tensor parallelism)."""
    resources_per_engine: dict[str, float] = {}
    """Custom Ray resources of one engine, as named in cluster.yaml."""
    num_threads: int = Field(default=1, ge=1)
    """Threads of one engine on the CPU."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Number format of a model's weights and computation."""
    max_model_len: int = Field(default=2048, ge=16)
    """The most tokens of prompt and response together.

    A prompt that leaves no room for max_new_tokens gets no response, and is counted.
    """
    kv_cache_memory_bytes: int = Field(default=2**28, ge=2**20)
    """Bytes of the key-value cache of one engine on the CPU."""


class LabelsConfig(Section):
    """The scorer whose raw scores become gold scores: a checkpoint or a served reward model.

    `rm-robust run-reward-model` and `rm-robust adopt` make checkpoints. The key of a service comes from the
    environment, as for every client.
    """

    checkpoint: Path | None = None
    """The directory of a reward-model checkpoint. Either checkpoint or url must be set, and not both."""
    url: str | None = None
    """The base URL of a scoring service."""
    model: str | None = None
    """The name of a model of the service at `url`; None takes its first."""
    device: str = "cpu"
    """The device on which `checkpoint` scores."""

    @model_validator(mode="after")
    def _one_scorer(self) -> Self:
        if (self.checkpoint is None) == (self.url is None):
            raise ValueError("labels needs a checkpoint or a url, and not both")
        return self


class ResponsesConfig(Section):
    """A whole set of responses: prompts, models and labels."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name of the set of responses."""
    seed: int = Field(default=0, ge=0, lt=2**31)
    """Seed of the sampling. A response depends on it, on its model and on its prompt, not on the other prompts."""
    prompts: list[str] = []
    """jsonl or parquet files, or folders of them, local or as URIs: rows with a prompt (text or messages).

    A prompt that comes twice is taken once.
    """
    existing: list[str] = []
    """Files of the same kinds with existing responses, which are labelled with the others.

    Their prompts get responses too. A row has prompt, model and completion; or, as in UltraFeedback, an instruction and
    completions that each have model and response.
    """
    num_prompts: int | None = Field(default=None, ge=1)
    """The number of prompts to take, those of `existing` before those of `prompts`; None takes all."""
    chunk_prompts: int = Field(default=256, ge=1)
    """The number of prompts whose responses are written together. A killed run does at most these again."""
    sampling: SamplingConfig = SamplingConfig()
    """How responses are sampled."""
    engines: EnginesConfig = EnginesConfig()
    """What a model computes on."""
    models: list[ResponseModel] = []
    """Models that respond. Their names must differ."""
    labels: LabelsConfig | None = None
    """The scorer of the responses; None gives responses without gold scores."""

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        if not self.prompts and not self.existing:
            raise ValueError("prompts and existing are both empty: there is nothing to respond to")
        names = [model.name for model in self.models]
        if len(set(names)) < len(names):
            raise ValueError(f"models must have names of their own, got {sorted(names)}")
        if self.sampling.max_new_tokens >= self.engines.max_model_len:
            raise ValueError(
                f"sampling.max_new_tokens = {self.sampling.max_new_tokens} leaves no room for a prompt "
                "in engines.max_model_len"
            )
        return self
