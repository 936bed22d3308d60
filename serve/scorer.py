"""What a scorer behind the HTTP contract must do. checkpoint_scorer.py and judge_scorer.py do it; deployment.py calls it.

requests of one batch ──score_requests──► one Scored or one Refusal per request, in order
nothing               ──describe────────► the ServedModel
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from rm_robust.scoring import ScoreInput, ScoreRequest, ScoreResult


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
    """What a replica has loaded. `template` and `max_length_tokens` are None for a scorer that makes no tokens."""

    model: str
    checkpoint: str
    template: str | None
    max_length_tokens: int | None


@dataclass(frozen=True)
class Scored:
    """Raw scores of one request, input by input, and the model they come from: it travels with them, so it is never another's."""

    served: ServedModel
    results: list[ScoreResult]
    num_cut: int = 0
    """Rendered conversations of which what follows the end of turn was left off."""


@dataclass(frozen=True)
class Refusal:
    """Why one request got no scores: the HTTP status and error body of its reply."""

    status: int
    type: str
    message: str
    retry_after_s: float | None = None


Outcome = Scored | Refusal


class Scorer(Protocol):
    """Loaded once per replica; called by one thread at a time."""

    def describe(self) -> ServedModel:
        """What is loaded; immediate."""

    def score_requests(self, requests: Sequence[ScoreRequest | DialectRequest]) -> list[Outcome]:
        """One outcome per request, in order. A request that cannot be scored is refused alone: its batch mates get their scores."""


def parts_of(request: ScoreRequest | DialectRequest) -> list[Part]:
    if isinstance(request, DialectRequest):
        return request.parts
    return [Part(item, f"inputs[{index}].prompt", f"inputs[{index}].completions[{{}}]") for index, item in enumerate(request.inputs)]


def invalid_request(where: str, reason: object) -> Refusal:
    """The request itself is wrong: 422, naming the field."""
    return Refusal(422, "invalid_request", f"{where}: {reason}")
