"""Define the records that cross a stage or process boundary. They are frozen, typed and without behaviour."""

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
    """One response model's completion of one prompt, and the score that the gold judge gives it."""

    prompt_id: str
    prompt: list[Message]
    model: str
    completion: str
    gold_score: float


@dataclass(frozen=True)
class ConversationGroup:
    """A prompt and its K completions.

    A preference pair has K = 2, the chosen completion first, and gold scores 1 and 0. A demonstration has K = 1.
    """

    group_id: str
    prompt: list[Message]
    completions: list[str]
    gold_scores: list[float]
    models: list[str]
    """The model that wrote each completion; "" where the source does not say."""
    margin: float | None


@dataclass(frozen=True)
class TokenGroup:
    """A prompt and its K completions as token ids; every completion ends with the scored end-of-turn token."""

    prompt_ids: list[int]
    completion_ids: list[list[int]]


@dataclass(frozen=True)
class PreferencePair:
    """A training pair as token ids: K = 2, the chosen completion first."""

    tokens: TokenGroup
    margin: float = 0.0
    """The margin in score units; 0 for a pair without one."""
    weight: float = 1.0
    """The weight (> 0) of the pair's loss in the batch."""
