"""The types that pass between the HTTP side and a model's replicas.

    request ──Preparer──► work items, in the front    ──Batch──► BatchScorer, in a replica ──► scores, item by item

There are two kinds of model: a checkpoint (scorers/checkpoint_preparer.py and scorers/checkpoint_scorer.py) and the
embedded judge (scorers/judge.py, with both halves).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from rm_robust.data.records import TokenGroup
from rm_robust.scoring.contract import ScoreInput, ScoreRequest, ScoreResult, TokenCounts


@dataclass(frozen=True)
class Part:
    """One thing to score, and the names of its fields in the caller's body, which refusals repeat."""

    content: ScoreInput | str | list[int]
    """A prompt with its completions, or a whole conversation that the caller has rendered, as text or token ids."""
    prompt_field: str
    """The field of the prompt, such as `inputs[0].prompt`."""
    completion_field: str
    """The field of the completions, with `{}` in the place of a completion's index."""


@dataclass(frozen=True)
class DialectRequest:
    """What a client of another server asks to have scored (http/dialects.py)."""

    parts: list[Part]


@dataclass(frozen=True)
class ServedModel:
    """What a replica has loaded. `template`, `max_length_tokens` and `calibration` are None if the model has none."""

    model: str
    checkpoint: str
    template: str | None
    max_length_tokens: int | None
    calibration: tuple[float, float] | None = None
    """Mean and standard deviation of the scores on held-out pairs, from the manifest."""
    checkpoint_dir: str | None = None
    generation: int = 0
    """A number that grows with every deployment of the model, so the newer of two checkpoints is known."""
    max_batch_tokens: int = 1 << 30
    """Tokens that a replica computes at a time. A prompt whose completions have more becomes several work items."""
    reload_error: str | None = None
    """Why the replica does not serve the newest deployment's checkpoint; None when it does."""

    def replaces(self, other: "ServedModel") -> bool:
        """Return whether this is a newer deployment, or another checkpoint of the same one.

        A deployment has another checkpoint when its directory was written again.
        """
        return self.generation > other.generation or (
            self.generation == other.generation and self.checkpoint != other.checkpoint
        )


@dataclass(frozen=True)
class WorkItem:
    """One input, or some of its completions, as a replica takes it. Its token counts are its share of a batch."""

    input_index: int
    content: TokenGroup | ScoreInput
    prompt_key: int
    """A hash that is equal for equal prompts: a batch computes such prompts once."""
    num_prompt_tokens: int
    num_completion_tokens: int

    @property
    def num_tokens(self) -> int:
        return self.num_prompt_tokens + self.num_completion_tokens


@dataclass(frozen=True)
class Prepared:
    """A request's work items, in the order of its inputs and their completions, and the token counts of each input."""

    items: list[WorkItem]
    counts: list[TokenCounts | None]
    num_cut: int = 0
    """The number of rendered conversations that were cut after their end of turn."""


@dataclass(frozen=True)
class Batch:
    """Items that one replica scores together, prepared for one checkpoint of one generation."""

    generation: int
    checkpoint: str
    contents: list[TokenGroup | ScoreInput]


@dataclass(frozen=True)
class BatchScores:
    """The raw scores of a batch, item by item. An entry that is text says why that item alone has no scores."""

    replica: str
    results: list[list[float] | str]


@dataclass(frozen=True)
class OtherGeneration:
    """The reply of a replica that has another checkpoint than the batch was prepared for, and scored nothing."""

    served: ServedModel


@dataclass(frozen=True)
class Scored:
    """The raw scores of one request, input by input, and the model that they come from.

    The model travels with the scores, so a reply never names another model than the one that scored.
    """

    served: ServedModel
    results: list[ScoreResult]
    num_cut: int = 0


@dataclass(frozen=True)
class Refusal:
    """Why one request got no scores: the HTTP status and the error body of its reply."""

    status: int
    type: str
    message: str
    retry_after_s: float | None = None


Outcome = Scored | Refusal
ScoringRequest = ScoreRequest | DialectRequest
"""A request for scores, in our own form or in another server's."""


class Preparer(Protocol):
    """The front's half of a model. One thread at a time calls it."""

    def prepare(self, request: ScoringRequest) -> Prepared | Refusal:
        """Return the request as work items, or a refusal: 422 for what the model cannot take, 413 for a long one."""


class BatchScorer(Protocol):
    """A replica's half of a model. One thread at a time calls it."""

    served: ServedModel

    def score(self, contents: Sequence[TokenGroup | ScoreInput]) -> list[list[float] | str]:
        """Return one entry per item, in order.

        An item that cannot be scored fails alone: the other items of the batch get their scores.
        """


def parts_of(request: ScoringRequest) -> list[Part]:
    """Return what the request asks to have scored, in order."""
    if isinstance(request, DialectRequest):
        return request.parts
    return [
        Part(item, f"inputs[{index}].prompt", f"inputs[{index}].completions[{{}}]")
        for index, item in enumerate(request.inputs)
    ]


def invalid_request(field: str, reason: object) -> Refusal:
    """Return the refusal of a request that is itself wrong: 422, with the name of the field."""
    return Refusal(422, "invalid_request", f"{field}: {reason}")
