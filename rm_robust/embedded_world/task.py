"""What a prompt asks for, and what checking an answer against it finds."""

from dataclasses import dataclass
from enum import Enum


class Form(Enum):
    """How the items of an answer are put into text."""

    BARE = "bare"
    SENTENCE = "sentence"
    LIST = "list"


@dataclass(frozen=True)
class Task:
    """All that answering and judging need to know about a prompt. Words are spelled as in the prompt's text."""

    family: str
    allowed_items: tuple[str, ...]
    """The items of the right answer; where any `num_items` of a kind will do, every allowed one of that kind."""
    num_items: int
    is_ordered: bool
    confusable: tuple[str, ...]
    """Wrong items that a careless answer takes from the prompt or from nearby."""
    must_include: tuple[str, ...] = ()
    """The allowed items without which no answer is right, where several sets of items are."""
    mentionable: tuple[str, ...] = ()
    """Words besides the items that an answer may use without claiming anything (the noun to describe, both addends)."""
    required: tuple[str, ...] = ()
    """Those of `mentionable` that a full answer uses (the noun to describe, the thing that is counted)."""

    @property
    def is_open(self) -> bool:
        """Whether several sets of items are right."""
        return self.num_items < len(self.allowed_items)


@dataclass(frozen=True)
class Verification:
    """Both in [0, 1]. Correctness: nothing wrong, missing, doubled or misplaced. Coverage: how much of what was asked for is there."""

    correctness: float
    coverage: float
