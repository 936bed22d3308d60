"""The data that crosses a stage or process boundary. Frozen, typed, no behaviour."""

from dataclasses import dataclass

Message = dict[str, str]
"""One chat turn: {"role": "system" | "user" | "assistant", "content": text}."""


@dataclass(frozen=True)
class SftExample:
    """One demonstration: a single user turn and the answer to imitate."""

    prompt: str
    completion: str


@dataclass(frozen=True)
class NamedResponse:
    """What one response model wrote for one prompt, and what the gold judge says of it."""

    prompt_id: str
    prompt: list[Message]
    model: str
    completion: str
    gold_score: float


@dataclass(frozen=True)
class ConversationGroup:
    """A prompt and K completions. A preference pair is K = 2, chosen first, gold scores 1 and 0; a demonstration is K = 1."""

    group_id: str
    prompt: list[Message]
    completions: list[str]
    gold_scores: list[float]
    models: list[str]
    """Who wrote each completion; "" where the source does not say."""
    margin: float | None


@dataclass(frozen=True)
class TokenGroup:
    """A prompt and its K completions as token ids; every completion ends in the scored end-of-turn token."""

    prompt_ids: list[int]
    completion_ids: list[list[int]]


@dataclass(frozen=True)
class PreferencePair:
    """A training pair as tokens: K = 2, chosen first. `margin` in score units (0 without one), `weight` > 0 of its loss in the batch."""

    tokens: TokenGroup
    margin: float = 0.0
    weight: float = 1.0
