"""Six families of short instructions whose answers can be verified from the prompt text alone.

Each family: how its slots are drawn, the task they ask for, and how items, right or wrong, are put into text.
"""

from collections.abc import Sequence
from functools import lru_cache
from random import Random

from rm_robust.embedded_world.task import Form, Task
from rm_robust.embedded_world.task_family import Slots, TaskFamily, are_distinct, join_with_and, phrase_items
from rm_robust.embedded_world.words import ADJECTIVES, ALPHABET_WORDS, COUNTED_THINGS, KINDS, NAMES, NUMBERS, SINGULAR, THINGS

ADDENDS = NUMBERS[2:10]
ITEM_COUNTS = ("two", "three", "four")


def _sort_task(slots: Slots) -> Task | None:
    words = list(slots.values())
    if not are_distinct(words, ALPHABET_WORDS):
        return None
    return Task("order_words", tuple(sorted(words)), 3, True, (), (), tuple(word for word in ALPHABET_WORDS if word not in words))


ORDER_WORDS = TaskFamily(
    name="order_words",
    wordings=(
        "Put these words in alphabetical order: {a}, {b}, {c}.",
        "Sort the words {a}, {b} and {c} from A to Z.",
        "Write {a}, {b} and {c} in the order of the alphabet.",
    ),
    draw_slots=lambda rng: dict(zip("abc", rng.sample(ALPHABET_WORDS, 3), strict=True)),
    build_task=_sort_task,
    phrase=lambda task, items, form: phrase_items(items, form, "The order is"),
    num_distinct_prompts=3 * 16 * 15 * 14,
)


def _draw_repeat(rng: Random) -> Slots:
    words = rng.sample(THINGS, 4)
    return {**dict(zip("abcd", words, strict=True)), "without": rng.choice(words)}


def _repeat_task(slots: Slots) -> Task | None:
    without = slots["without"]
    words = [slots[slot] for slot in "abcd"]
    if not are_distinct(words, THINGS) or without not in words:
        return None
    return Task("repeat_without", tuple(word for word in words if word != without), 3, True, (), (), (without,))


REPEAT_WITHOUT = TaskFamily(
    name="repeat_without",
    wordings=(
        "Repeat these words but leave out {without}: {a}, {b}, {c}, {d}.",
        "Say the words {a}, {b}, {c} and {d} again, but without {without}.",
    ),
    draw_slots=_draw_repeat,
    build_task=_repeat_task,
    phrase=lambda task, items, form: phrase_items(items, form, "The words are"),
    num_distinct_prompts=2 * 20 * 19 * 18 * 17 * 4,
)


def _draw_fact(rng: Random) -> Slots:
    (name, other_name), (thing, other_thing) = rng.sample(NAMES, 2), rng.sample(THINGS, 2)
    asked_name, asked_thing = rng.choice(((name, thing), (other_name, other_thing)))
    return {"n": name, "m": other_name, "t": thing, "u": other_thing, "asked_name": asked_name, "asked_thing": asked_thing}


def _fact_task(slots: Slots) -> Task | None:
    owner_of = {slots["t"]: slots["n"], slots["u"]: slots["m"]}
    thing_of = {slots["n"]: slots["t"], slots["m"]: slots["u"]}
    if not are_distinct((slots["n"], slots["m"]), NAMES) or not are_distinct((slots["t"], slots["u"]), THINGS):
        return None
    if "asked_thing" in slots:
        asked, answer_to = slots["asked_thing"], owner_of
    else:
        asked, answer_to = slots["asked_name"], thing_of
    if asked not in answer_to:
        return None
    others = tuple(answer for question, answer in answer_to.items() if question != asked)
    return Task("answer_from_fact", (answer_to[asked],), 1, True, (asked,), (), others)


def _phrase_fact(task: Task, items: Sequence[str], form: Form) -> str:
    (asked,) = task.mentionable
    if asked in NAMES:
        things = join_with_and([f"a {item}" for item in items])
        return things if form is Form.BARE else f"{asked} has {things}."
    return join_with_and(items) if form is Form.BARE else f"{join_with_and(items)} has the {asked}."


ANSWER_FROM_FACT = TaskFamily(
    name="answer_from_fact",
    wordings=(
        "{n} has a {t}. {m} has a {u}. Who has the {asked_thing}?",
        "{n} has a {t}. {m} has a {u}. What does {asked_name} have?",
    ),
    draw_slots=_draw_fact,
    build_task=_fact_task,
    phrase=_phrase_fact,
    num_distinct_prompts=2 * 12 * 11 * 20 * 19 * 2,
)


def _draw_listing(rng: Random) -> Slots:
    kind = rng.choice(tuple(KINDS))
    first, second = rng.sample(KINDS[kind], 2)
    return {"count": rng.choice(ITEM_COUNTS), "kind": kind, "x": first, "y": second}


def _listing_task(slots: Slots) -> Task | None:
    kind, excluded = slots["kind"], (slots["x"], slots["y"])
    if kind not in KINDS or slots["count"] not in ITEM_COUNTS or not are_distinct(excluded, KINDS[kind]):
        return None
    allowed = tuple(item for item in KINDS[kind] if item not in excluded)
    return Task("list_items", allowed, NUMBERS.index(slots["count"]), False, (), (), excluded)


def _phrase_listing(task: Task, items: Sequence[str], form: Form) -> str:
    kind = next(kind for kind, nouns in KINDS.items() if task.allowed_items[0] in nouns)
    return phrase_items(items, form, f"The {kind} are")


LIST_ITEMS = TaskFamily(
    name="list_items",
    wordings=(
        "Name {count} {kind} but do not use {x} or {y}.",
        "Write a list of {count} {kind} without {x} and {y}.",
        "Give me {count} {kind} other than {x} and {y}.",
    ),
    draw_slots=_draw_listing,
    build_task=_listing_task,
    phrase=_phrase_listing,
    num_distinct_prompts=3 * 3 * 7 * 10 * 9,
)


def _draw_addition(rng: Random) -> Slots:
    first, second = (rng.choice(ADDENDS) for _ in range(2))
    return {"name": rng.choice(NAMES), "a": first, "b": second, "things": rng.choice(COUNTED_THINGS)}


def _addition_task(slots: Slots) -> Task | None:
    addends, things = (slots["a"], slots["b"]), slots["things"]
    if slots["name"] not in NAMES or things not in COUNTED_THINGS or not set(addends) <= set(ADDENDS):
        return None
    total = sum(NUMBERS.index(addend) for addend in addends)
    near_misses = tuple(NUMBERS[total + error] for error in (-2, -1, 1, 2) if total + error not in map(NUMBERS.index, addends))
    return Task("add_numbers", (NUMBERS[total],), 1, True, (*addends, slots["name"], SINGULAR[things]), (SINGULAR[things],), near_misses)


def _phrase_addition(task: Task, items: Sequence[str], form: Form) -> str:
    amount = f"{join_with_and(items)} {task.required[0]}s"
    return amount if form is Form.BARE else f"There are {amount}."


ADD_NUMBERS = TaskFamily(
    name="add_numbers",
    wordings=(
        "{name} has {a} {things} and gets {b} more. How many {things} are there now?",
        "{name} finds {a} {things} and then {b} more {things}. How many {things} are there?",
    ),
    draw_slots=_draw_addition,
    build_task=_addition_task,
    phrase=_phrase_addition,
    num_distinct_prompts=2 * 12 * 10 * 8 * 8,
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
    return f"a {', '.join(items)} {noun}" if form is Form.BARE else f"The {noun} is {join_with_and(items)}."


DESCRIBE_WITH = TaskFamily(
    name="describe_with",
    wordings=(
        "Describe a {noun} in one sentence with the words {x} and {y}.",
        "Write one short sentence about a {noun} that uses {x} and {y}.",
    ),
    draw_slots=_draw_description,
    build_task=_description_task,
    phrase=_phrase_description,
    num_distinct_prompts=2 * 20 * 16 * 15,
)

FAMILIES = {family.name: family for family in (ORDER_WORDS, REPEAT_WITHOUT, ANSWER_FROM_FACT, LIST_ITEMS, ADD_NUMBERS, DESCRIBE_WITH)}


@lru_cache(maxsize=1 << 15)
def find_task(prompt: str) -> Task | None:
    """The task that `prompt` states, whichever family it is of, or None if it is not one of the world's prompts."""
    return next((task for family in FAMILIES.values() if (task := family.parse(prompt)) is not None), None)
