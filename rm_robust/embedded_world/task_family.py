"""What every family of tasks can do, and how one wording serves both ways: filled it is the prompt, as a pattern it reads the prompt back."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from random import Random

from rm_robust.embedded_world.task import Form, Task, Verification
from rm_robust.embedded_world.verification import verify_items

Slots = dict[str, str]
"""The words that fill a wording's {slots}, by slot name; slots that a wording does not use are left out."""


@dataclass(frozen=True)
class TaskFamily:
    """One kind of task. The prompt text is the only carrier: `parse` recovers from it everything that an answer depends on."""

    name: str
    wordings: tuple[str, ...]
    """Prompt texts with {slots}; a slot is one word."""
    draw_slots: Callable[[Random], Slots]
    build_task: Callable[[Slots], Task | None]
    """The task these words ask for, or None if `draw_slots` could not have drawn them."""
    phrase: Callable[[Task, Sequence[str], Form], str]
    """Puts items, right or wrong, into text. Families of one-item answers have no list form: it reads as a sentence."""
    num_distinct_prompts: int

    def make(self, rng: Random) -> str:
        """A random prompt."""
        return rng.choice(self.wordings).format(**self.draw_slots(rng))

    def parse(self, prompt: str) -> Task | None:
        """The task that `prompt` states, or None if it is not one of this family's prompts."""
        for pattern in self._patterns:
            match = pattern.fullmatch(prompt.strip())
            if match:
                return self.build_task(match.groupdict())
        return None

    def ideal_items(self, task: Task, rng: Random) -> list[str]:
        """The items of one right answer, in a right order; where several are right, neighbours from the one to include on."""
        if not task.is_open:
            return list(task.allowed_items)
        items, (included,) = task.allowed_items, task.must_include
        start = items.index(included)
        return [items[(start + offset) % len(items)] for offset in range(task.num_items)]

    def ideal_answer(self, task: Task, rng: Random) -> str:
        """A right answer as one plain sentence of at most 15 words."""
        return self.phrase(task, self.ideal_items(task, rng), Form.SENTENCE)

    def verify(self, task: Task, completion: str) -> Verification:
        """How right and how full `completion` is, whatever its form (see `verify_items`)."""
        return verify_items(task, completion)

    @cached_property
    def _patterns(self) -> list[re.Pattern[str]]:
        return [pattern_of_wording(wording) for wording in self.wordings]


def pattern_of_wording(wording: str) -> re.Pattern[str]:
    """The regular expression that reads the slots back; a slot that occurs twice must hold the same word twice."""
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
    """Whether all `words` are different and in `vocabulary`."""
    return len(set(words)) == len(words) and set(words) <= set(vocabulary)


def phrase_items(items: Sequence[str], form: Form, sentence_start: str) -> str:
    """A comma list, a sentence, or one numbered item a line."""
    if form is Form.LIST:
        return "\n".join(f"{number}. {item}" for number, item in enumerate(items, start=1))
    return f"Answer: {', '.join(items)}" if form is Form.BARE else f"{sentence_start} {join_with_and(items)}."


def join_with_and(items: Sequence[str]) -> str:
    """`a`; `a and b`; `a, b and c`."""
    return " and ".join(part for part in (", ".join(items[:-1]), *items[-1:]) if part)
