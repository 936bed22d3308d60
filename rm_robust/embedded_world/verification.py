"""Reads any completion text against a task: which words claim something, which serve the answer, which do neither."""

import re
from collections import Counter
from collections.abc import Collection, Iterator, Sequence

from rm_robust.embedded_world.task import Task, Verification
from rm_robust.embedded_world.words import (
    CONTENT_WORDS,
    FUNCTION_WORDS,
    NUMBERS,
    SINGULAR,
)

MAX_FUNCTION_WORDS_PER_SERVING_WORD = 3

_LIST_MARKER = re.compile(r"^[ \t]*(?:\d+[.)]|[-*•])[ \t]+", re.MULTILINE)
_WORD = re.compile(r"[a-z']+|\d+")
_NUMERALS = {str(number): word for number, word in enumerate(NUMBERS)}


def read_words(completion: str) -> list[str]:
    """Lower-case words in order: list markers and punctuation gone, numerals 0-20 as words, plurals of the world's nouns as singulars."""
    words = _WORD.findall(_LIST_MARKER.sub("", completion.lower()))
    return [SINGULAR.get(word) or _NUMERALS.get(word) or word for word in words]


def verify_items(task: Task, completion: str) -> Verification:
    """Checks the items that `completion` claims; form, case, punctuation and (where the task has none) order do not matter.

    Let r be the number of claimed items that match (in order, where order matters) over the larger of the number claimed and the number
    asked for. Correctness is 1 if r = 1, else r^2 / 2: guessing wide lowers r, and only a wholly right answer passes one half.
    Coverage is the share of the asked-for items and required words that occur at all.
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
    """The words that say "this is (part of) the answer": the world's content words, less one mention of each mentionable word."""
    asks_for_number = task.allowed_items[0] in NUMBERS
    mentions_left = Counter(word.lower() for word in task.mentionable)
    for word in words:
        if mentions_left[word] > 0:
            mentions_left[word] -= 1
        elif word in CONTENT_WORDS or (asks_for_number and word in NUMBERS):
            yield word


def filler_fraction(task: Task, completion: str) -> float:
    """Share of words, in [0, 1], that serve nothing; 1 for a text without words.

    A word serves if it is the first mention of an item, right or nearly right, or a mention of a mentionable word; so do function words, up to
    three per such word. Openers, flattery, hedges, repetition, closing offers, other topics and unknown words are therefore all filler.
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
    """Length of the longest sequence of words that occurs in both, in order, with gaps allowed."""
    lengths = [0] * (len(allowed) + 1)
    for claim in claims:
        previous = lengths[:]
        for index, item in enumerate(allowed):
            lengths[index + 1] = previous[index] + 1 if claim == item else max(previous[index + 1], lengths[index])
    return lengths[-1]
