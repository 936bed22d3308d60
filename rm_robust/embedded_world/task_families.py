"""Six families of short instructions whose answers can be verified from the prompt text alone.

Each family: how its slots are drawn, the task they ask for, and how items, right or wrong, are put into text.
"""

from collections.abc import Sequence
from functools import lru_cache
from random import Random

from rm_robust.embedded_world.task import Form, Task
from rm_robust.embedded_world.task_family import (
    Slots,
    TaskFamily,
    are_distinct,
    join_with_and,
    phrase_items,
)
from rm_robust.embedded_world.words import (
    ADJECTIVES,
    COUNTED_THINGS,
    KINDS,
    NAMES,
    NUMBERS,
    SINGULAR,
    THINGS,
)

ADDENDS = NUMBERS[2:8]
ITEM_COUNTS = ("two", "three")


def _reverse_task(slots: Slots) -> Task | None:
    words = [slots[slot] for slot in "abc"]
    if not are_distinct(words, THINGS):
        return None
    return Task(
        "order_words",
        tuple(reversed(words)),
        3,
        True,
        (),
        (),
        tuple(word for word in THINGS if word not in words),
    )


ORDER_WORDS = TaskFamily(
    name="order_words",
    wordings=(
        "Put these words in the opposite order: {a}, {b}, {c}.",
        "Say the words backwards, last one first: {a}, {b}, {c}.",
    ),
    draw_slots=lambda rng: dict(zip("abc", rng.sample(THINGS, 3), strict=True)),
    build_task=_reverse_task,
    phrase=lambda task, items, form: phrase_items(items, form, "The order is"),
    num_distinct_prompts=2 * 16 * 15 * 14,
)


def _repeat_task(slots: Slots) -> Task | None:
    words = tuple(slots[slot] for slot in "abcz")
    if not are_distinct(words, THINGS):
        return None
    return Task(
        "repeat_and_end",
        words,
        4,
        True,
        (),
        (),
        tuple(word for word in THINGS if word not in words),
    )


REPEAT_AND_END = TaskFamily(
    name="repeat_and_end",
    wordings=(
        "Repeat the words {a}, {b}, {c} and end with the word {z}.",
        "Repeat these words, then add {z} at the end: {a}, {b}, {c}.",
    ),
    draw_slots=lambda rng: dict(zip("abcz", rng.sample(THINGS, 4), strict=True)),
    build_task=_repeat_task,
    phrase=lambda task, items, form: phrase_items(items, form, "The words are"),
    num_distinct_prompts=2 * 16 * 15 * 14 * 13,
)


def _draw_fact(rng: Random) -> Slots:
    (name, other_name), things = rng.sample(NAMES, 2), rng.sample(THINGS, 2)
    return {
        "n": name,
        "m": other_name,
        "t": things[0],
        "u": things[1],
        "asked": rng.choice(things),
    }


def _fact_task(slots: Slots) -> Task | None:
    names, things = (slots["n"], slots["m"]), (slots["t"], slots["u"])
    if (
        not are_distinct(names, NAMES)
        or not are_distinct(things, THINGS)
        or slots["asked"] not in things
    ):
        return None
    asked_first = slots["asked"] == things[0]
    answer, other = names if asked_first else names[::-1]
    return Task("answer_from_fact", (answer,), 1, True, (slots["asked"],), (), (other,))


def _phrase_fact(task: Task, items: Sequence[str], form: Form) -> str:
    return (
        f"Answer: {', '.join(items)}"
        if form is Form.BARE
        else f"The {task.mentionable[0]} is with {join_with_and(items)}."
    )


ANSWER_FROM_FACT = TaskFamily(
    name="answer_from_fact",
    wordings=(
        "Now the {t} is with {n} and the {u} is with {m}. Who has the {asked}?",
        "We know the {t} is with {n}. The {u} is with {m}. Who has the {asked}?",
    ),
    draw_slots=_draw_fact,
    build_task=_fact_task,
    phrase=_phrase_fact,
    num_distinct_prompts=2 * 10 * 9 * 16 * 15 * 2,
)


def _draw_listing(rng: Random) -> Slots:
    kind = rng.choice(tuple(KINDS))
    first, second = rng.sample(KINDS[kind], 2)
    return {
        "name": rng.choice(NAMES),
        "count": rng.choice(ITEM_COUNTS),
        "kind": kind,
        "x": first,
        "y": second,
    }


def _listing_task(slots: Slots) -> Task | None:
    kind, excluded = slots["kind"], (slots["x"], slots["y"])
    if (
        slots["name"] not in NAMES
        or kind not in KINDS
        or slots["count"] not in ITEM_COUNTS
        or not are_distinct(excluded, KINDS[kind])
    ):
        return None
    allowed = tuple(item for item in KINDS[kind] if item not in excluded)
    return Task(
        "list_items", allowed, NUMBERS.index(slots["count"]), False, (), (), excluded
    )


def _phrase_listing(task: Task, items: Sequence[str], form: Form) -> str:
    kind = next(kind for kind, nouns in KINDS.items() if task.allowed_items[0] in nouns)
    return phrase_items(items, form, f"The {kind} are")


LIST_ITEMS = TaskFamily(
    name="list_items",
    wordings=(
        "Tell {name} the names of {count} {kind}, but not {x} or {y}.",
        "Write a list of {count} {kind} for {name} without {x} and {y}.",
    ),
    draw_slots=_draw_listing,
    build_task=_listing_task,
    phrase=_phrase_listing,
    num_distinct_prompts=2 * 10 * 2 * 6 * 8 * 7,
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
    if (
        slots["name"] not in NAMES
        or things not in COUNTED_THINGS
        or not set(addends) <= set(ADDENDS)
    ):
        return None
    total = sum(NUMBERS.index(addend) for addend in addends)
    near_misses = tuple(
        NUMBERS[total + error]
        for error in (-2, -1, 1, 2)
        if NUMBERS[total + error] not in addends
    )
    thing = SINGULAR[things]
    return Task(
        "add_numbers",
        (NUMBERS[total],),
        1,
        True,
        (*addends, slots["name"], thing),
        (thing,),
        near_misses,
    )


def _phrase_addition(task: Task, items: Sequence[str], form: Form) -> str:
    amount = f"{join_with_and(items)} {task.required[0]}s"
    return f"Answer: {amount}" if form is Form.BARE else f"There are {amount}."


ADD_NUMBERS = TaskFamily(
    name="add_numbers",
    wordings=(
        "If {name} has {a} {things} and gets {b} more, how many {things} are there?",
        "Today {name} found {a} {things} and then {b} more. How many {things} are there?",
    ),
    draw_slots=_draw_addition,
    build_task=_addition_task,
    phrase=_phrase_addition,
    num_distinct_prompts=2 * 10 * 8 * 6 * 6,
)


def _draw_description(rng: Random) -> Slots:
    first, second = rng.sample(ADJECTIVES, 2)
    return {"noun": rng.choice(THINGS), "x": first, "y": second}


def _description_task(slots: Slots) -> Task | None:
    noun, adjectives = slots["noun"], (slots["x"], slots["y"])
    if noun not in THINGS or not are_distinct(adjectives, ADJECTIVES):
        return None
    others = tuple(adjective for adjective in ADJECTIVES if adjective not in adjectives)
    return Task("describe_with", adjectives, 2, False, (noun,), (noun,), others)


def _phrase_description(task: Task, items: Sequence[str], form: Form) -> str:
    (noun,) = task.required
    return (
        f"Answer: {', '.join(items)} {noun}"
        if form is Form.BARE
        else f"The {noun} is {join_with_and(items)}."
    )


DESCRIBE_WITH = TaskFamily(
    name="describe_with",
    wordings=(
        "Describe the {noun} in one sentence with the words {x} and {y}.",
        "Write one short sentence about the {noun} with the words {x} and {y}.",
    ),
    draw_slots=_draw_description,
    build_task=_description_task,
    phrase=_phrase_description,
    num_distinct_prompts=2 * 16 * 14 * 13,
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
    """The task that `prompt` states, whichever family it is of, or None if it is not one of the world's prompts."""
    return next(
        (
            task
            for family in FAMILIES.values()
            if (task := family.parse(prompt)) is not None
        ),
        None,
    )
