"""What goes between the HTTP side and a model's replicas.

    request ──Preparer──► work items, in the front    ──Batch──► BatchScorer, in a replica ──► scores, item by item

checkpoint_preparer.py with checkpoint_scorer.py, and judge_scorer.py, are the two kinds of model.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from rm_robust.data.records import TokenGroup
from rm_robust.scoring.contract import ScoreInput, ScoreRequest, ScoreResult, TokenCounts


@dataclass(frozen=True)
class Part:
    """One thing to score, and what the caller's body calls it, for refusals."""

    content: ScoreInput | str | list[int]
    """A prompt with its completions; or a whole conversation, rendered by the caller, as text or token ids."""
    prompt_field: str
    completion_field: str
    """With `{}` where the completion's number stands."""


@dataclass(frozen=True)
class DialectRequest:
    """What a client of another server asks (dialects.py)."""

    parts: list[Part]


@dataclass(frozen=True)
class ServedModel:
    """What a replica has loaded. `template`, `max_length_tokens` and `calibration` are None where there are none."""

    model: str
    checkpoint: str
    template: str | None
    max_length_tokens: int | None
    calibration: tuple[float, float] | None = None
    """Mean and standard deviation of the scores on held-out pairs, from the manifest."""
    checkpoint_dir: str | None = None
    generation: int = 0
    """Grows with every deployment of the model, so that of two checkpoints the newer one is known."""
    max_batch_tokens: int = 1 << 30
    """What a replica computes at a time; a prompt with more completions is several work items."""
    reload_error: str | None = None
    """Why the newest deployment's checkpoint is not this one."""

    def replaces(self, other: "ServedModel") -> bool:
        """A newer deployment, or (a directory that was written anew) another checkpoint of the same one."""
        return self.generation > other.generation or (
            self.generation == other.generation and self.checkpoint != other.checkpoint
        )


@dataclass(frozen=True)
class WorkItem:
    """One input, or some of its completions, as a replica takes it. Its cost is what it adds to a batch."""

    input_index: int
    content: TokenGroup | ScoreInput
    prompt_key: int
    """Equal for equal prompts: a batch computes them once."""
    num_prompt_tokens: int
    num_completion_tokens: int

    @property
    def num_tokens(self) -> int:
        return self.num_prompt_tokens + self.num_completion_tokens


@dataclass(frozen=True)
class Prepared:
    """A request's work items, in the order of its inputs and their completions, with the token counts of each input."""

    items: list[WorkItem]
    counts: list[TokenCounts | None]
    num_cut: int = 0
    """Rendered conversations of which what follows the end of turn was left off."""


@dataclass(frozen=True)
class Batch:
    """Items for one forward, prepared for this checkpoint of this generation."""

    generation: int
    checkpoint: str
    contents: list[TokenGroup | ScoreInput]


@dataclass(frozen=True)
class BatchScores:
    """Raw scores item by item; a text says why that item alone has none."""

    replica: str
    results: list[list[float] | str]


@dataclass(frozen=True)
class OtherGeneration:
    """The replica has another checkpoint than the batch was prepared for, and scored nothing."""

    served: ServedModel


@dataclass(frozen=True)
class Scored:
    """Raw scores of one request, input by input, and the model they come from: it travels with them, so it is never another's."""

    served: ServedModel
    results: list[ScoreResult]
    num_cut: int = 0


@dataclass(frozen=True)
class Refusal:
    """Why one request got no scores: the HTTP status and error body of its reply."""

    status: int
    type: str
    message: str
    retry_after_s: float | None = None


Outcome = Scored | Refusal
Request = ScoreRequest | DialectRequest


class Preparer(Protocol):
    """The front's half of a model. One thread at a time."""

    def prepare(self, request: Request) -> Prepared | Refusal:
        """The request as work items; 422 for what the model cannot take, 413 for what is too long."""


class BatchScorer(Protocol):
    """A replica's half of a model. One thread at a time."""

    served: ServedModel

    def score(self, contents: Sequence[TokenGroup | ScoreInput]) -> list[list[float] | str]:
        """One entry an item, in order. An item that cannot be scored fails alone: its batch mates get their scores."""


def parts_of(request: Request) -> list[Part]:
    if isinstance(request, DialectRequest):
        return request.parts
    return [
        Part(item, f"inputs[{index}].prompt", f"inputs[{index}].completions[{{}}]")
        for index, item in enumerate(request.inputs)
    ]


def invalid_request(where: str, reason: object) -> Refusal:
    """The request itself is wrong: 422, naming the field."""
    return Refusal(422, "invalid_request", f"{where}: {reason}")
