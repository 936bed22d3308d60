"""What `pipelines/generate_responses.py` reads: response models, how they sample, and who labels what they say."""

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from rm_robust.config.shared import Section


class ResponseModel(Section):
    """One source of responses."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """As the scenarios know it (data.unseen_models), and its folder's name."""
    path: str
    """Hugging Face directory or hub name of a causal language model whose tokenizer has a chat template."""
    temperature: float | None = Field(default=None, gt=0)
    """None: that of [sampling]."""


class SamplingConfig(Section):
    """One response a prompt and model. The defaults are the released code's (GenerationArguments)."""

    temperature: float = Field(default=0.8, gt=0)
    top_p: float = Field(default=1.0, gt=0, le=1)
    max_new_tokens: int = Field(default=512, ge=1)


class EnginesConfig(Section):
    """The vLLM engines of one model; the models come one after the other."""

    num_engines: int = Field(default=1, ge=1)
    num_cpus_per_engine: float = Field(default=1, ge=0)
    num_gpus_per_engine: int = Field(default=0, ge=0)
    """More than one: the model's layers are split among them (tensor parallelism). 0: CPU."""
    resources_per_engine: dict[str, float] = {}
    """Custom Ray resources, as named in cluster.yaml."""
    num_threads: int = Field(default=1, ge=1)
    """Of one engine, on CPU."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    max_model_len: int = Field(default=2048, ge=16)
    """Tokens of prompt and response; a prompt that leaves no room for max_new_tokens gets no response, and is counted."""
    kv_cache_memory_bytes: int = Field(default=2**28, ge=2**20)
    """On CPU."""


class LabelsConfig(Section):
    """The scorer whose raw scores become gold scores: a checkpoint (pipelines/full_reward_model.py and `rm_robust.models.adopt` make them) or a
    served one. The latter's key comes from the environment, as for every client."""

    checkpoint: Path | None = None
    url: str | None = None
    model: str | None = None
    """With `url`: which of its models; None: its only one."""
    device: str = "cpu"
    """With `checkpoint`."""

    @model_validator(mode="after")
    def _one_scorer(self) -> Self:
        if (self.checkpoint is None) == (self.url is None):
            raise ValueError("labels needs a checkpoint or a url, and not both")
        return self


class ResponsesConfig(Section):
    """A whole set of responses."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    seed: int = Field(default=0, ge=0, lt=2**31)
    prompts: list[str] = []
    """jsonl or parquet files or folders of them, local or as URIs: rows with a prompt (text or messages). A prompt that comes twice is taken once."""
    existing: list[str] = []
    """The same kinds of files: responses that are there already, to be labelled with the others; their prompts are taken too. Rows with prompt, model,
    completion; or as UltraFeedback has them, instruction and completions of model and response."""
    num_prompts: int | None = Field(default=None, ge=1)
    """The first so many, those of `existing` before those of `prompts`; None: all."""
    chunk_prompts: int = Field(default=256, ge=1)
    """Prompts whose responses are committed together: what a killed run does again."""
    sampling: SamplingConfig = SamplingConfig()
    engines: EnginesConfig = EnginesConfig()
    models: list[ResponseModel] = []
    labels: LabelsConfig | None = None
    """None: responses without gold scores."""

    @model_validator(mode="after")
    def _models_differ(self) -> Self:
        if not self.prompts and not self.existing:
            raise ValueError("prompts and existing are both empty: there is nothing to respond to")
        names = [model.name for model in self.models]
        if len(set(names)) < len(names):
            raise ValueError(f"models must have names of their own, got {sorted(names)}")
        if self.sampling.max_new_tokens >= self.engines.max_model_len:
            raise ValueError(
                f"sampling.max_new_tokens = {self.sampling.max_new_tokens} leaves no room for a prompt in engines.max_model_len"
            )
        return self
