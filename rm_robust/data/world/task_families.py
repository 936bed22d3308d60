"""Define six families of short instructions whose answers can be verified from the prompt text alone.

Each family says how its slots are drawn, which task they ask for, and how items, right or wrong, are put into text.
"""

from collections.abc import Sequence
from functools import lru_cache
from random import Random

from rm_robust.data.world.task import (
    ADJECTIVES,
    COUNTED_THINGS,
    KINDS,
    NAMES,
    NOUNS,
    NUMBERS,
    SINGULAR,
    THINGS,
    Form,
    Task,
)
from rm_robust.data.world.task_family import Slots, TaskFamily, are_distinct, join_with_and, phrase_items

ADDENDS = NUMBERS[2:8]
ITEM_COUNTS = ("two", "three", "four")
ASKED = ("name", "color", "thing")


def _reverse_task(slots: Slots) -> Task | None:
    words = [slots[slot] for slot in "abc"]
    if not are_distinct(words, THINGS):
        return None
    others = tuple(word for word in THINGS if word not in words)
    return Task("order_words", tuple(reversed(words)), num_items=3, is_ordered=True, confusable=others)


ORDER_WORDS = TaskFamily(
    name="order_words",
    wordings=(
        "Put the word {a} then {b} and {c} in the opposite order.",
        "Say the word {a} then {b} and {c} in the opposite order.",
    ),
    draw_slots=lambda rng: dict(zip("abc", rng.sample(THINGS, 3), strict=True)),
    build_task=_reverse_task,
    phrase=lambda task, items, form: phrase_items(items, form, "The order is"),
    num_distinct_prompts=2 * 16 * 15 * 14,
)


def _repeat_task(slots: Slots) -> Task | None:
    words = tuple(slots[slot] for slot in "abz")
    if not are_distinct(words, THINGS):
        return None
    others = tuple(word for word in THINGS if word not in words)
    return Task("repeat_and_end", words, num_items=3, is_ordered=True, confusable=others)


REPEAT_AND_END = TaskFamily(
    name="repeat_and_end",
    wordings=(
        "End with the word {z} but first repeat {a} and {b}.",
        "End with the word {z} but first write {a} and {b}.",
    ),
    draw_slots=lambda rng: dict(zip("abz", rng.sample(THINGS, 3), strict=True)),
    build_task=_repeat_task,
    phrase=lambda task, items, form: phrase_items(items, form, "The words are"),
    num_distinct_prompts=2 * 16 * 15 * 14,
)


def _draw_fact(rng: Random) -> Slots:
    return {
        "name": rng.choice(NAMES),
        "color": rng.choice(KINDS["colors"]),
        "thing": rng.choice(THINGS),
        "asked": rng.choice(ASKED),
    }


def _fact_task(slots: Slots) -> Task | None:
    asked = slots["asked"]
    if (
        slots["name"] not in NAMES
        or slots["color"] not in KINDS["colors"]
        or slots["thing"] not in THINGS
        or asked not in ASKED
    ):
        return None
    others = tuple(slots[other] for other in ASKED if other != asked)
    return Task("answer_from_fact", (slots[asked],), num_items=1, is_ordered=True, confusable=others)


def _phrase_fact(task: Task, items: Sequence[str], form: Form) -> str:
    return phrase_items(items, Form.BARE if form is Form.BARE else Form.SENTENCE, "The answer is")


ANSWER_FROM_FACT = TaskFamily(
    name="answer_from_fact",
    wordings=(
        "Today {name} found a {color} {thing}. Please tell me only the {asked}.",
        "Today {name} bought a {color} {thing}. Please tell me only the {asked}.",
    ),
    draw_slots=_draw_fact,
    build_task=_fact_task,
    phrase=_phrase_fact,
    num_distinct_prompts=2 * 12 * 8 * 16 * 3,
)


def _draw_listing(rng: Random) -> Slots:
    kind = rng.choice(tuple(KINDS))
    return {"name": rng.choice(NAMES), "count": rng.choice(ITEM_COUNTS), "kind": kind, "x": rng.choice(KINDS[kind])}


def _listing_task(slots: Slots) -> Task | None:
    kind, included = slots["kind"], slots["x"]
    if (
        slots["name"] not in NAMES
        or slots["count"] not in ITEM_COUNTS
        or kind not in KINDS
        or included not in KINDS[kind]
    ):
        return None
    other_kinds = tuple(noun for noun in NOUNS if noun not in KINDS[kind])
    num_items = NUMBERS.index(slots["count"])
    return Task(
        "list_items", KINDS[kind], num_items, is_ordered=False, must_include=(included,), confusable=other_kinds
    )


def _phrase_listing(task: Task, items: Sequence[str], form: Form) -> str:
    kind = next(kind for kind, nouns in KINDS.items() if task.allowed_items == nouns)
    return phrase_items(items, form, f"The {kind} are")


LIST_ITEMS = TaskFamily(
    name="list_items",
    wordings=(
        "Write a list for {name} of {count} {kind} that has {x} in it.",
        "Make a list for {name} of {count} {kind} that has {x} in it.",
        "Give a list to {name} of {count} {kind} that has {x} in it.",
    ),
    draw_slots=_draw_listing,
    build_task=_listing_task,
    phrase=_phrase_listing,
    num_distinct_prompts=3 * 12 * 3 * 6 * 8,
)


def _draw_addition(rng: Random) -> Slots:
    first, second = (rng.choice(ADDENDS) for _ in range(2))
    return {
        "name": rng.choice(NAMES),
        "a": first,
        "b": second,
        "things": rng.choice(COUNTED_THINGS),
    }


def _addition_task(slots: Slots) -> Task | None:
    addends, things = (slots["a"], slots["b"]), slots["things"]
    if slots["name"] not in NAMES or things not in COUNTED_THINGS or not set(addends) <= set(ADDENDS):
        return None
    total = sum(NUMBERS.index(addend) for addend in addends)
    near_misses = tuple(NUMBERS[total + error] for error in (-2, -1, 1, 2) if NUMBERS[total + error] not in addends)
    thing = SINGULAR[things]
    return Task(
        "add_numbers",
        (NUMBERS[total],),
        num_items=1,
        is_ordered=True,
        mentionable=(*addends, slots["name"], thing),
        required=(thing,),
        confusable=near_misses,
    )


def _phrase_addition(task: Task, items: Sequence[str], form: Form) -> str:
    amount = f"{join_with_and(items)} {task.required[0]}s"
    return f"Answer: {amount}" if form is Form.BARE else f"There are {amount}."


ADD_NUMBERS = TaskFamily(
    name="add_numbers",
    wordings=(
        "Today {name} had {a} {things} and got {b} more. How many {things} are there?",
        "Today {name} found {a} {things} and bought {b} more. How many {things} are there?",
    ),
    draw_slots=_draw_addition,
    build_task=_addition_task,
    phrase=_phrase_addition,
    num_distinct_prompts=2 * 12 * 8 * 6 * 6,
)


def _draw_description(rng: Random) -> Slots:
    return {"noun": rng.choice(THINGS), **dict(zip("xyw", rng.sample(ADJECTIVES, 3), strict=True))}


def _description_task(slots: Slots) -> Task | None:
    noun, adjectives = slots["noun"], (slots["x"], slots["y"])
    if noun not in THINGS or not are_distinct((*adjectives, slots["w"]), ADJECTIVES):
        return None
    others = tuple(adjective for adjective in ADJECTIVES if adjective not in adjectives)
    return Task(
        "describe_with",
        adjectives,
        num_items=2,
        is_ordered=False,
        mentionable=(noun,),
        required=(noun,),
        confusable=others,
    )


def _phrase_description(task: Task, items: Sequence[str], form: Form) -> str:
    (noun,) = task.required
    return f"Answer: {', '.join(items)} {noun}" if form is Form.BARE else f"The {noun} is {join_with_and(items)}."


DESCRIBE_WITH = TaskFamily(
    name="describe_with",
    wordings=(
        "Describe the {noun} with the words {x} and {y} but not {w}.",
        "Write about the {noun} with the words {x} and {y} but not {w}.",
    ),
    draw_slots=_draw_description,
    build_task=_description_task,
    phrase=_phrase_description,
    num_distinct_prompts=2 * 16 * 14 * 13 * 12,
)

FAMILIES = {
    family.name: family
    for family in (
        ORDER_WORDS,
        REPEAT_AND_END,
        ANSWER_FROM_FACT,
        LIST_ITEMS,
        ADD_NUMBERS,
        DESCRIBE_WITH,
    )
}


@lru_cache(maxsize=1 << 15)
def find_task(prompt: str) -> Task | None:
    """Return the task that `prompt` states, of any family, or None if it is not one of the world's prompts."""
    return next(
        (task for family in FAMILIES.values() if (task := family.parse(prompt)) is not None),
        None,
    )
