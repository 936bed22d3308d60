"""The embedded world's whole vocabulary, what a prompt asks for, and what checking an answer against it finds.

The words are few and common, so that a byte-level BPE of about 800 entries makes nearly all of them one token. Prompts and completions are
worded so that none of these words opens a text: a tokenizer sees each in one spelling, with a space before it.
"""

from dataclasses import dataclass
from enum import Enum

NAMES = ("Anna", "Ben", "Eva", "Jack", "Leo", "Lily", "Max", "Mia", "Nina", "Rosa", "Sam", "Tom")
NUMBERS = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"),
    *("ten", "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen"),
)
"""NUMBERS[n] is the word for n."""
KINDS = {
    "animals": ("cat", "dog", "horse", "cow", "pig", "goat", "lion", "bear"),
    "colors": ("red", "blue", "green", "black", "white", "brown", "pink", "gray"),
    "fruits": ("pear", "plum", "lemon", "melon", "peach", "grape", "mango", "cherry"),
    "foods": ("bread", "rice", "soup", "cheese", "meat", "cake", "honey", "salt"),
    "clothes": ("hat", "coat", "shirt", "sock", "belt", "boot", "shoe", "scarf"),
    "tools": ("hammer", "knife", "saw", "rope", "nail", "spoon", "fork", "drill"),
}
"""Every noun of the world by its kind, eight of each."""
ADJECTIVES = (
    *("small", "big", "round", "new", "warm", "cold", "soft"),
    *("hard", "clean", "dirty", "happy", "sad", "heavy", "light"),
)
THINGS = (
    *("cat", "dog", "horse", "cow", "pig", "goat", "pear", "plum"),
    *("lemon", "melon", "hat", "coat", "shirt", "belt", "spoon", "fork"),
)
"""Nouns one can own, repeat, order and describe."""
COUNTED_THINGS = ("cats", "dogs", "pears", "plums", "lemons", "hats", "coats", "forks")
NOUNS = tuple(noun for nouns in KINDS.values() for noun in nouns)
CONTENT_WORDS = frozenset(word.lower() for word in (*NOUNS, *ADJECTIVES, *NAMES))
"""Lower-case words that make a claim when a completion uses them; number words claim only where a number was asked for."""
FUNCTION_WORDS = frozenset(
    (
        "a",
        "an",
        "the",
        "and",
        "is",
        "are",
        "has",
        "have",
        "it",
        "there",
        "now",
        "with",
        "in",
        "order",
        "words",
        "answer",
        *KINDS,
    )
)
"""Lower-case words that hold an answer together. They claim nothing and, in moderation, are no filler."""
SINGULAR = {noun + "s": noun for noun in NOUNS}


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
