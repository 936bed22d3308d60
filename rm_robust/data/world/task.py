"""Define the embedded world's vocabulary, the task that a prompt states, and the result of checking an answer.

The words are few and common, so that a byte-level BPE of about 800 entries makes nearly all of them one token. No
prompt or completion begins with one of these words, so that a tokenizer sees each of them in one spelling, with a space
before it.
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
"""All nouns of the world by their kind, eight of each kind."""
ADJECTIVES = (
    *("small", "big", "round", "new", "warm", "cold", "soft"),
    *("hard", "clean", "dirty", "happy", "sad", "heavy", "light"),
)
THINGS = (
    *("cat", "dog", "horse", "cow", "pig", "goat", "pear", "plum"),
    *("lemon", "melon", "hat", "coat", "shirt", "belt", "spoon", "fork"),
)
"""Nouns that can be owned, repeated, ordered and described."""
COUNTED_THINGS = ("cats", "dogs", "pears", "plums", "lemons", "hats", "coats", "forks")
NOUNS = tuple(noun for nouns in KINDS.values() for noun in nouns)
CONTENT_WORDS = frozenset(word.lower() for word in (*NOUNS, *ADJECTIVES, *NAMES))
"""Lower-case words that claim something in a completion. Number words claim only where a number is asked for."""
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
"""Lower-case words that hold an answer together. They claim nothing, and a moderate number of them is no filler."""
SINGULAR = {noun + "s": noun for noun in NOUNS}


class Form(Enum):
    """The form in which the items of an answer are put into text."""

    BARE = "bare"
    SENTENCE = "sentence"
    LIST = "list"


@dataclass(frozen=True)
class Task:
    """What a prompt asks for: all that answering and judging need. Words are spelled as in the prompt's text."""

    family: str
    allowed_items: tuple[str, ...]
    """The items of the right answer; where any `num_items` items of a kind are right, all items of that kind."""
    num_items: int
    is_ordered: bool
    confusable: tuple[str, ...]
    """Wrong items that a careless answer could hold: other words of the prompt, or words like the right ones."""
    must_include: tuple[str, ...] = ()
    """The allowed items that every right answer must have, where several sets of items are right."""
    mentionable: tuple[str, ...] = ()
    """Words besides the items that an answer may use without claiming anything (the noun to describe, both addends)."""
    required: tuple[str, ...] = ()
    """The words of `mentionable` that a full answer uses (the noun to describe, the thing that is counted)."""

    @property
    def is_open(self) -> bool:
        """Return whether several sets of items are right."""
        return self.num_items < len(self.allowed_items)


@dataclass(frozen=True)
class Verification:
    """The result of checking an answer, both values in [0, 1].

    `correctness` is 1 if nothing is wrong, missing, doubled or misplaced. `coverage` is the share of what was asked for
    that the answer holds.
    """

    correctness: float
    coverage: float
