"""Settings of the data: the embedded world, and where text comes from."""

from collections.abc import Sequence
from enum import StrEnum
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from rm_robust.config.shared import Section, WhereItRuns

LOST_FRACTION_TO_WARN_OF = 0.1
"""The share of a source's rows that may be lost unsaid."""


class Overlong(StrEnum):
    """What happens to a prompt that is too long."""

    DROP = "drop"
    TRUNCATE_PROMPT_LEFT = "truncate_prompt_left"


class WorldConfig(Section):
    """Sizes of the embedded world, a text that the run makes from its seed (used when data.source = "embedded")."""

    num_sft_examples: int = Field(default=12000, ge=16)
    """Number of demonstrations that the policy imitates."""
    num_training_prompts: int = Field(default=3000, ge=8)
    """Number of prompts of the preference pairs. Each prompt has one training pair and one in-domain pair."""
    num_validation_prompts: int = Field(default=400, ge=4)
    """Number of prompts of the prompt-disjoint and mutual-disjoint sets."""
    num_rloo_prompts: int = Field(default=2000, ge=4)
    """Number of prompts that RLOO samples from. They are disjoint from all others."""


class WeightedPath(Section):
    """A training source with its weight. A source that is written as a bare path has the weight 1."""

    path: str = Field(min_length=1)
    """File or folder of jsonl or parquet, locally or as a URI, or a data set of the hub."""
    weight: float = Field(default=1.0, gt=0)
    """Factor of the weight of its pairs in the loss. A pair has the weight 1; the pairs of one ranking share a weight
    of 1."""

    @model_validator(mode="before")
    @classmethod
    def _a_text_is_a_path(cls, value: Any) -> Any:
        return {"path": value} if isinstance(value, str) else value


class DataConfig(Section):
    """Where text comes from.

    A path names a jsonl or parquet file or a folder of them, locally or as a URI (s3://, gs://, file://, …). A data set
    of the hub is written as "hub:owner/name[:split]".
    """

    source: Literal["embedded", "responses", "scenarios", "prompts"] = "embedded"
    """Where preferences come from. `embedded`: the run makes its own world ([world]). `responses`: responses of named
    models with gold scores, from which the four scenarios are built; it needs responses and unseen_models. `scenarios`:
    ready-made files (pairs, or K completions with gold scores); it needs train and in_domain. `prompts`: there are no
    preferences, only rloo_prompts, because rloo.proxy names a reward model that exists already."""
    responses: list[str] = []
    """Files with rows of prompt, model, completion and gold_score; hub names are refused (source = "responses"
    only)."""
    unseen_models: list[str] = []
    """Response models held out for the response-disjoint and mutual-disjoint sets (source = "responses" only)."""
    validation_prompt_fraction: float = Field(default=0.18, gt=0, lt=1)
    """Share of the prompts that is held out (source = "responses" only). Paper: 11,082 of 62,282."""
    train: list[WeightedPath] = []
    """Training pairs or rankings, as paths or as tables { path = "…", weight = 2.0 }. Every two completions of a
    ranking whose scores differ become a pair. Like the next four, it is read with source = "scenarios" only, which
    needs at least one entry here and in in_domain."""
    in_domain: list[str] = []
    """Files of the in-domain scenario: other pairs or completions of the training prompts by the training models."""
    prompt_disjoint: list[str] = []
    """Files of the prompt-disjoint scenario: new prompts, answered by the training models. Empty: the run goes without
    this scenario."""
    response_disjoint: list[str] = []
    """Files of the response-disjoint scenario: training prompts, answered by unseen models. Empty: the run goes without
    it."""
    mutual_disjoint: list[str] = []
    """Files of the mutual-disjoint scenario: new prompts, answered by unseen models. Empty: the run goes without it."""
    sft: list[str] = []
    """Demonstrations, with prompt and completion, or with messages; or pairs, whose chosen completions are imitated
    (the files of data.train may be named here again). They are needed unless sft.enabled = false or the source is
    embedded."""
    rloo_prompts: list[str] = []
    """Rows with a prompt (text or messages). RLOO needs them unless the source is embedded, and then serve.gold must be
    another judge than `embedded`. A run that only trains a reward model does not need them."""
    max_dropped_fraction: float = Field(default=0.01, ge=0, le=1)
    """Largest share of a source's rows that may be malformed; the run fails when there are more. Pairs that are
    over-long, identical or tied are counted separately (see max_lost_fraction)."""
    max_lost_fraction: float = Field(default=0.5, ge=0, le=1)
    """Largest share of a source's rows that may be dropped for any reason but tied scores; the run fails when there are
    more. Above 0.1 there is a warning, on the terminal and in the report."""
    max_prompt_tokens: int = Field(default=96, ge=4)
    """Largest number of tokens of a prompt, with chat template and assistant header; `overlong` says what happens to
    longer ones."""
    overlong: Overlong = Overlong.DROP
    """What happens to a pair, ranking or demonstration whose prompt is longer than max_prompt_tokens. `drop` leaves it
    out. `truncate_prompt_left` cuts the prompt's oldest tokens, but never its begin-of-sequence token and its assistant
    header. Both are counted. Longer prompts of rloo_prompts are always dropped."""
    max_completion_tokens: int = Field(default=96, ge=2)
    """Largest number of tokens of a completion, the end-of-turn token included. Longer ones are dropped and counted. A
    model from scratch must take prompt and completion together (model.max_position_embeddings)."""
    task_resources: WhereItRuns[dict[str, float]] = {}
    """Custom Ray resources, as named in cluster.yaml, that each task of Ray Data asks for beside its one CPU. These
    tasks read, tokenise and write."""

    @model_validator(mode="after")
    def _sources_are_named(self) -> Self:
        needed: dict[str, dict[str, Sequence[object]]] = {
            "embedded": {},
            "responses": {"responses": self.responses, "unseen_models": self.unseen_models},
            "scenarios": {"train": self.train, "in_domain": self.in_domain},
            "prompts": {"rloo_prompts": self.rloo_prompts},
        }
        empty = [f"data.{name}" for name, values in needed[self.source].items() if not values]
        if empty:
            raise ValueError(f'data.source = "{self.source}" needs {" and ".join(empty)}, which must not be empty')
        return self

    @model_validator(mode="after")
    def _responses_are_files(self) -> Self:
        for path in self.responses:
            if path.startswith("hub:"):
                raise ValueError(
                    f"data.responses names {path!r}: it takes files only. Download the data set, and name its files"
                )
        return self
