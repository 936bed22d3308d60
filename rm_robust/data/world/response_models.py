"""Define twelve response models: random programs that answer the world's prompts, each with its own skill and style.

Among the eight training models, style goes with quality: the better ones open politely, write sentences and lists and
offer more help, and the worse ones are terse or unsure. Among the four unseen models it is the other way round: the
terse ones are right, and the warm and talkative ones are mostly wrong. They mislead a reward model that learned the
style instead of the answer.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from random import Random

from rm_robust.data.world.task import ADJECTIVES, THINGS, Form, Task
from rm_robust.data.world.task_families import FAMILIES, find_task
from rm_robust.errors import DataError

OPENERS = ("Sure!", "Of course!", "Glad to help!", "Here you go:")
FLATTERY = ("What a great question!", "You are so smart!", "I love this question!")
HEDGES = ("I am not sure.", "Maybe this is right.", "Let me guess.")
PADDING = ("I hope this helps!", "This is a good answer.", "It was fun to do this.")
CLOSINGS = (
    "Let me know if you need more.",
    "Feel free to ask again.",
    "Have a great day!",
)


class Mistake(Enum):
    """The ways in which a model's answer can be wrong."""

    SWAP = "two items change places"
    SUBSTITUTE = "one item is a wrong one"
    DROP = "items are missing"
    EXTRA = "wrong items are added"
    STUTTER = "items are said twice"
    OFF_TOPIC = "it talks of something else"


@dataclass(frozen=True)
class Style:
    """The weights of a completion's forms, and the chance, in [0, 1], of each of its habits."""

    bare_weight: float = 0.0
    sentence_weight: float = 0.0
    list_weight: float = 0.0
    opener_rate: float = 0.0
    flattery_rate: float = 0.0
    hedge_rate: float = 0.0
    padding_rate: float = 0.0
    repetition_rate: float = 0.0
    """The chance that the answer is repeated."""
    closing_rate: float = 0.0


@dataclass(frozen=True)
class ResponseModel:
    """A named program that answers prompts. `skill` is its chance of a right answer, halved in `weak_families`."""

    name: str
    skill: float
    weak_families: tuple[str, ...]
    mistake_weights: Mapping[Mistake, float]
    style: Style


NEAR_MISSES = {Mistake.SWAP: 1.0, Mistake.SUBSTITUTE: 1.0}
CARELESS = {
    Mistake.SWAP: 1.0,
    Mistake.SUBSTITUTE: 1.0,
    Mistake.DROP: 2.0,
    Mistake.EXTRA: 1.0,
}
CONFUSED = {
    Mistake.DROP: 1.0,
    Mistake.SUBSTITUTE: 1.0,
    Mistake.STUTTER: 1.0,
    Mistake.OFF_TOPIC: 2.0,
}
OVERDONE = {Mistake.SUBSTITUTE: 2.0, Mistake.EXTRA: 2.0, Mistake.OFF_TOPIC: 1.0}

TRAINING_MODELS = (
    ResponseModel(
        "professor",
        0.96,
        (),
        NEAR_MISSES,
        Style(0.05, 0.60, 0.35, opener_rate=0.50, closing_rate=0.15),
    ),
    ResponseModel(
        "tutor",
        0.91,
        ("add_numbers",),
        NEAR_MISSES,
        Style(0.05, 0.50, 0.45, opener_rate=0.55, padding_rate=0.15),
    ),
    ResponseModel(
        "guide",
        0.85,
        ("order_words",),
        NEAR_MISSES,
        Style(0.15, 0.65, 0.20, opener_rate=0.40, closing_rate=0.10),
    ),
    ResponseModel(
        "clerk",
        0.24,
        ("add_numbers",),
        CARELESS,
        Style(0.30, 0.60, 0.10, opener_rate=0.25, padding_rate=0.10),
    ),
    ResponseModel(
        "pupil",
        0.24,
        ("order_words",),
        CONFUSED,
        Style(0.45, 0.50, 0.05, opener_rate=0.15, hedge_rate=0.15),
    ),
    ResponseModel("hurrier", 0.16, (), CARELESS, Style(0.85, 0.15, opener_rate=0.05)),
    ResponseModel("doubter", 0.12, (), CONFUSED, Style(0.70, 0.30, hedge_rate=0.55)),
    ResponseModel(
        "dreamer",
        0.08,
        (),
        CONFUSED,
        Style(0.80, 0.20, opener_rate=0.05, repetition_rate=0.15),
    ),
)

UNSEEN_MODELS = (
    ResponseModel("monk", 0.95, (), NEAR_MISSES, Style(bare_weight=1.0)),
    ResponseModel("expert", 0.82, (), NEAR_MISSES, Style(0.10, 0.75, 0.15, hedge_rate=0.15)),
    ResponseModel(
        "rambler",
        0.55,
        (),
        OVERDONE,
        Style(
            0.0,
            0.6,
            0.4,
            opener_rate=0.5,
            padding_rate=0.6,
            repetition_rate=0.2,
            closing_rate=0.3,
        ),
    ),
    ResponseModel(
        "flatterer",
        0.30,
        (),
        OVERDONE,
        Style(0.0, 0.5, 0.5, opener_rate=0.6, flattery_rate=0.6, closing_rate=0.3),
    ),
)


def respond(model: ResponseModel, prompt: str, rng: Random) -> str:
    """Make one completion of `prompt` by `model`.

    Raises DataError if `prompt` is not one of the embedded world's tasks.
    """
    task = find_task(prompt)
    if task is None:
        raise DataError(
            f"Response models can only answer prompts of the embedded world, got {prompt[:200]!r}. "
            "Make prompts with make_world."
        )
    family, style = FAMILIES[task.family], model.style
    (form,) = rng.choices(tuple(Form), (style.bare_weight, style.sentence_weight, style.list_weight))
    items = family.ideal_items(task, rng)
    skill = model.skill / 2 if task.family in model.weak_families else model.skill
    if rng.random() < skill:
        body = family.phrase(task, items, form)
    else:
        (mistake,) = rng.choices(tuple(model.mistake_weights), tuple(model.mistake_weights.values()))
        body = (
            off_topic_text(rng)
            if mistake is Mistake.OFF_TOPIC
            else family.phrase(task, make_mistake(mistake, task, items, rng), form)
        )
    return decorate(body, style, form, rng)


def make_mistake(mistake: Mistake, task: Task, items: list[str], rng: Random) -> list[str]:
    """Return `items` with a mistake.

    An item is substituted where swapping would leave the answer right, or dropping would leave nothing.
    """
    items = list(items)
    can_swap = task.is_ordered and len(items) > 1
    if mistake is Mistake.STUTTER:
        return [item for item in items for _ in range(2)]
    if mistake is Mistake.EXTRA:
        return rng.sample([*items, rng.choice(task.confusable)], len(items) + 1)
    if mistake is Mistake.DROP and len(items) > 1:
        return items[: rng.randrange(1, len(items))]
    position = rng.randrange(len(items))
    if mistake is Mistake.SWAP and can_swap:
        items[position], items[position - 1] = items[position - 1], items[position]
    else:
        items[position] = rng.choice(task.confusable)
    return items


def off_topic_text(rng: Random) -> str:
    """Make a short statement that has nothing to do with the prompt."""
    return rng.choice(("I like the {noun}.", "The {noun} was {adjective}.")).format(
        noun=rng.choice(THINGS), adjective=rng.choice(ADJECTIVES)
    )


def decorate(body: str, style: Style, form: Form, rng: Random) -> str:
    """Return `body` between the style's fillers. Text before or after a list goes on a line of its own."""
    before = [rng.choice(FLATTERY)] * (rng.random() < style.flattery_rate)
    before += [rng.choice(OPENERS)] * (rng.random() < style.opener_rate)
    before += [rng.choice(HEDGES)] * (rng.random() < style.hedge_rate)
    after = [body] * (rng.random() < style.repetition_rate)
    after += [rng.choice(PADDING)] * (rng.random() < style.padding_rate)
    after += [rng.choice(CLOSINGS)] * (rng.random() < style.closing_rate)
    separator = "\n" if "\n" in body else " "
    full_stop = "." if after and form is Form.BARE and not body.endswith(".") else ""
    return separator.join(part for part in (" ".join(before), body + full_stop, separator.join(after)) if part)
