"""Define a family of tasks: it words a prompt, reads a prompt back, and checks any completion against the task.

A wording works in both directions: filled with words it is the prompt, and as a pattern it reads the prompt back. The
check tells which words of a completion claim something, which serve the answer, and which do neither.
"""

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from random import Random

from rm_robust.data.world.task import CONTENT_WORDS, FUNCTION_WORDS, NUMBERS, SINGULAR, Form, Task, Verification

MAX_FUNCTION_WORDS_PER_SERVING_WORD = 3
_LIST_MARKER = re.compile(r"^[ \t]*(?:\d+[.)]|[-*•])[ \t]+", re.MULTILINE)
_WORD = re.compile(r"[a-z']+|\d+")
_NUMERALS = {str(number): word for number, word in enumerate(NUMBERS)}
Slots = dict[str, str]
"""The words that fill a wording's {slots}, by slot name. Slots that a wording does not use are left out."""


@dataclass(frozen=True)
class TaskFamily:
    """One kind of task. `parse` finds everything that an answer depends on in the text of the prompt alone."""

    name: str
    wordings: tuple[str, ...]
    """The texts of prompts, with {slots}. A slot holds one word."""
    draw_slots: Callable[[Random], Slots]
    build_task: Callable[[Slots], Task | None]
    """Returns the task that the words ask for, or None if `draw_slots` could not have drawn them."""
    phrase: Callable[[Task, Sequence[str], Form], str]
    """Puts items, right or wrong, into text. Families of one-item answers give a sentence for the list form."""
    num_distinct_prompts: int

    def make(self, rng: Random) -> str:
        """Make a random prompt."""
        return rng.choice(self.wordings).format(**self.draw_slots(rng))

    def parse(self, prompt: str) -> Task | None:
        """Return the task that `prompt` states, or None if it is not one of this family's prompts."""
        for pattern in self._patterns:
            match = pattern.fullmatch(prompt.strip())
            if match:
                return self.build_task(match.groupdict())
        return None

    def ideal_items(self, task: Task, rng: Random) -> list[str]:
        """Return the items of one right answer, in a right order.

        Where several answers are right, the items are the one to include and those that follow it in `allowed_items`.
        """
        if not task.is_open:
            return list(task.allowed_items)
        items, (included,) = task.allowed_items, task.must_include
        start = items.index(included)
        return [items[(start + offset) % len(items)] for offset in range(task.num_items)]

    def ideal_answer(self, task: Task, rng: Random) -> str:
        """Return a right answer as one plain sentence of at most 15 words."""
        return self.phrase(task, self.ideal_items(task, rng), Form.SENTENCE)

    def verify(self, task: Task, completion: str) -> Verification:
        """Return how correct and how complete `completion` is, in any form (see `verify_items`)."""
        return verify_items(task, completion)

    @cached_property
    def _patterns(self) -> list[re.Pattern[str]]:
        return [pattern_of_wording(wording) for wording in self.wordings]


def pattern_of_wording(wording: str) -> re.Pattern[str]:
    """Return the regular expression that reads the slots back. A slot that occurs twice must hold one word twice."""
    pattern, seen_slots = "", set[str]()
    for part in re.split(r"(\{\w+\})", wording):
        slot = part.strip("{}")
        if not part.startswith("{"):
            pattern += re.escape(part)
        else:
            pattern += f"(?P={slot})" if slot in seen_slots else rf"(?P<{slot}>[A-Za-z]+)"
            seen_slots.add(slot)
    return re.compile(pattern)


def are_distinct(words: Sequence[str], vocabulary: Sequence[str]) -> bool:
    """Return whether all `words` are different and in `vocabulary`."""
    return len(set(words)) == len(words) and set(words) <= set(vocabulary)


def phrase_items(items: Sequence[str], form: Form, sentence_start: str) -> str:
    """Return items as a list with commas, as a sentence, or as numbered lines."""
    if form is Form.LIST:
        return "\n".join(f"{number}. {item}" for number, item in enumerate(items, start=1))
    return f"Answer: {', '.join(items)}" if form is Form.BARE else f"{sentence_start} {join_with_and(items)}."


def join_with_and(items: Sequence[str]) -> str:
    """Join items as in "a", "a and b" or "a, b and c"."""
    return " and ".join(part for part in (", ".join(items[:-1]), *items[-1:]) if part)


def read_words(completion: str) -> list[str]:
    """Return the words of a completion in order, in lower case.

    List markers and punctuation are removed. Numerals from 0 to 16 become words, and plurals of the world's nouns
    become singulars.
    """
    words = _WORD.findall(_LIST_MARKER.sub("", completion.lower()))
    return [SINGULAR.get(word) or _NUMERALS.get(word) or word for word in words]


def verify_items(task: Task, completion: str) -> Verification:
    """Check the items that `completion` claims.

    Form, case and punctuation do not matter, and order matters only where the task has one.

    Let r be the number of claimed items that match (in order, where order matters), divided by the larger of the number
    claimed and the number asked for. Correctness is 1 if r = 1, else r^2 / 2: claiming many items lowers r, and only a
    wholly right answer gets more than one half. Coverage is the share of the asked-for items and required words that
    occur at all.
    """
    words = read_words(completion)
    claims = list(claimed_items(task, words))
    allowed = [item.lower() for item in task.allowed_items]
    num_included = len(set(task.must_include).intersection(claims))
    num_others = len(set(allowed).difference(task.must_include).intersection(claims))
    num_covered = num_included + min(num_others, task.num_items - len(task.must_include))
    num_matching = longest_common_subsequence(claims, allowed) if task.is_ordered else num_covered
    match_fraction = num_matching / max(len(claims), task.num_items)
    num_required = len({word.lower() for word in task.required}.intersection(words))
    return Verification(
        correctness=1.0 if match_fraction == 1.0 else match_fraction**2 / 2,
        coverage=(num_covered + num_required) / (task.num_items + len(task.required)),
    )


def claimed_items(task: Task, words: Sequence[str]) -> Iterator[str]:
    """Yield the words that claim to be the answer or a part of it.

    These are the world's content words, except one mention of each mentionable word.
    """
    asks_for_number = task.allowed_items[0] in NUMBERS
    mentions_left = Counter(word.lower() for word in task.mentionable)
    for word in words:
        if mentions_left[word] > 0:
            mentions_left[word] -= 1
        elif word in CONTENT_WORDS or (asks_for_number and word in NUMBERS):
            yield word


def filler_fraction(task: Task, completion: str) -> float:
    """Return the share of words, in [0, 1], that do not serve the answer; 1 for a text without words.

    A word serves the answer if it is the first mention of an item, right or nearly right, or a mention of a mentionable
    word. Function words serve too, up to three for each such word. Openers, flattery, hedges, repetition, closing
    offers, other topics and unknown words are therefore all filler.
    """
    words = read_words(completion)
    if not words:
        return 1.0
    mentions_left = Counter(word.lower() for word in {*task.allowed_items, *task.confusable})
    mentions_left.update(word.lower() for word in task.mentionable)
    num_serving = (Counter(words) & mentions_left).total()
    num_function = sum(word in FUNCTION_WORDS for word in words)
    return 1 - (num_serving + min(num_function, MAX_FUNCTION_WORDS_PER_SERVING_WORD * num_serving)) / len(words)


def longest_common_subsequence(claims: Sequence[str], allowed: Collection[str]) -> int:
    """Return the length of the longest sequence of words that occurs in both, in order, with gaps allowed."""
    lengths = [0] * (len(allowed) + 1)
    for claim in claims:
        previous = lengths[:]
        for index, item in enumerate(allowed):
            lengths[index + 1] = previous[index] + 1 if claim == item else max(previous[index + 1], lengths[index])
    return lengths[-1]
