"""Settings of the data: the embedded world, and where text comes from."""

from collections.abc import Sequence
from enum import StrEnum
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from rm_robust.config.shared import Section


class Overlong(StrEnum):
    """What becomes of a prompt that is too long."""

    DROP = "drop"
    TRUNCATE_PROMPT_LEFT = "truncate_prompt_left"


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
