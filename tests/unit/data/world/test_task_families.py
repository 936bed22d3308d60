"""Check that made prompts can be read back, that ideal answers are right, and that the form of an answer is free."""

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rm_robust.data.world.task import Form, Task, Verification
from rm_robust.data.world.task_families import (
    ADD_NUMBERS,
    ANSWER_FROM_FACT,
    DESCRIBE_WITH,
    FAMILIES,
    LIST_ITEMS,
    ORDER_WORDS,
    REPEAT_AND_END,
    find_task,
)
from rm_robust.data.world.task_family import TaskFamily

RIGHT = Verification(correctness=1.0, coverage=1.0)
EXAMPLES = {
    "Say the word cat then plum and hat in the opposite order.": (ORDER_WORDS, "The order is hat, plum and cat."),
    "End with the word pear but first repeat dog and fork.": (REPEAT_AND_END, "The words are dog, fork and pear."),
    "Today Mia found a green belt. Please tell me only the color.": (ANSWER_FROM_FACT, "The answer is green."),
    "Make a list for Tom of two fruits that has plum in it.": (LIST_ITEMS, "The fruits are plum and lemon."),
    "Today Eva had five hats and got six more. How many hats are there?": (ADD_NUMBERS, "There are eleven hats."),
    "Describe the goat with the words sad and warm but not big.": (DESCRIBE_WITH, "The goat is sad and warm."),
}
"""Prompts with their family and an answer worked out by hand."""

families = st.sampled_from(list(FAMILIES.values()))
rngs = st.integers(0, 2**32 - 1).map(Random)


def task_of(prompt: str) -> Task:
    task = find_task(prompt)
    assert task is not None
    return task


@pytest.mark.parametrize(("prompt", "family", "answer"), [(prompt, *rest) for prompt, rest in EXAMPLES.items()])
def test_a_prompt_is_read_as_the_task_it_states(prompt: str, family: TaskFamily, answer: str) -> None:
    task = task_of(prompt)
    assert task.family == family.name
    assert family.verify(task, answer) == RIGHT
    assert family.ideal_answer(task, Random(0)) == answer


@given(families, rngs)
def test_parse_inverts_make_in_the_making_family_alone(family: TaskFamily, rng: Random) -> None:
    prompt = family.make(rng)
    tasks = {other.name: other.parse(prompt) for other in FAMILIES.values()}
    assert tasks.pop(family.name) == find_task(prompt) == find_task(f"  {prompt}\n")
    assert set(tasks.values()) == {None}
    assert 8 <= len(prompt.split()) <= 30


@given(families, rngs)
def test_every_word_that_an_answer_depends_on_is_read_from_the_prompt(family: TaskFamily, rng: Random) -> None:
    slots = family.draw_slots(rng)
    task = family.build_task(slots)
    for wording in family.wordings:
        assert family.parse(wording.format(**slots)) == task


@given(families, rngs)
def test_an_ideal_answer_is_right_in_every_form(family: TaskFamily, rng: Random) -> None:
    task = task_of(family.make(rng))
    assert 1 <= len(family.ideal_answer(task, rng).split()) <= 15
    for form in Form:
        assert family.verify(task, family.phrase(task, family.ideal_items(task, rng), form)) == RIGHT


@given(families, rngs)
def test_a_confusable_item_in_an_answer_makes_it_wrong(family: TaskFamily, rng: Random) -> None:
    task = task_of(family.make(rng))
    items = family.ideal_items(task, rng)
    for position in range(len(items)):
        wrong = [*items[:position], rng.choice(task.confusable), *items[position + 1 :]]
        assert family.verify(task, family.phrase(task, wrong, Form.SENTENCE)).correctness <= 0.5


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_a_family_has_thousands_of_prompts_and_never_more_than_it_says(family: TaskFamily) -> None:
    rng = Random(0)
    num_draws = 3 * family.num_distinct_prompts
    distinct = {family.make(rng) for _ in range(num_draws)}
    # Of n equally likely prompts, 3n draws miss each with probability e^-3 = 0.0498.
    assert family.num_distinct_prompts >= 4000
    assert 0.94 * family.num_distinct_prompts < len(distinct) <= family.num_distinct_prompts


@pytest.mark.parametrize(
    "prompt",
    [
        "",
        "Write a poem about the sea.",
        "Say the word cat then cat and hat in the opposite order.",
        "Say the word cat then zebra and hat in the opposite order.",
        "Make a list for Tom of two fruits that has hammer in it.",
        "Today Eva had five hats and got six more. How many cats are there?",
        "Describe the goat with the words sad and warm but not big. Thanks!",
    ],
)
def test_a_prompt_that_no_family_could_have_made_has_no_task(prompt: str) -> None:
    assert find_task(prompt) is None


@pytest.mark.parametrize(
    ("prompt", "completion"),
    [
        ("Say the word cat then plum and hat in the opposite order.", "1. hat\n2. plum\n3. cat"),
        ("Say the word cat then plum and hat in the opposite order.", "HAT plum CAT"),
        ("Say the word cat then plum and hat in the opposite order.", "- hats\n- plums\n- cats"),
        ("Today Eva had five hats and got six more. How many hats are there?", "11 hats"),
        ("Today Eva had five hats and got six more. How many hats are there?", "Five and six is eleven hats, Eva!"),
        ("Today Eva had five hats and got six more. How many hats are there?", "5 hats + 6 = 11"),
        ("Describe the goat with the words sad and warm but not big.", "a warm, sad goat"),
        ("Make a list for Tom of two fruits that has plum in it.", "cherry / plum"),
    ],
)
def test_case_numerals_plurals_lists_and_free_order_are_tolerated(prompt: str, completion: str) -> None:
    task = task_of(prompt)
    assert FAMILIES[task.family].verify(task, completion) == RIGHT


@pytest.mark.parametrize(
    ("prompt", "completion", "expected"),
    [
        # Three asked for, all there, the longest right run is 2 of 3: (2/3)^2 / 2.
        ("Say the word cat then plum and hat in the opposite order.", "hat, cat, plum", Verification(2 / 9, 1.0)),
        # Two of three: (2/3)^2 / 2, coverage 2/3.
        ("End with the word pear but first repeat dog and fork.", "dog, fork", Verification(2 / 9, 2 / 3)),
        # The right colour among two claimed: (1/2)^2 / 2.
        ("Today Mia found a green belt. Please tell me only the color.", "green or red", Verification(1 / 8, 1.0)),
        # Two fruits but not the one to include: one of two slots, (1/2)^2 / 2, coverage 1/2.
        ("Make a list for Tom of two fruits that has plum in it.", "lemon, melon", Verification(1 / 8, 1 / 2)),
        # A wrong sum of the right thing: nothing right, one of two asked-for words there.
        ("Today Eva had five hats and got six more. How many hats are there?", "twelve hats", Verification(0.0, 1 / 2)),
        # The noun is missing: both adjectives right, two of three words there.
        ("Describe the goat with the words sad and warm but not big.", "sad and warm", Verification(1.0, 2 / 3)),
    ],
)
def test_a_partly_right_answer_gets_the_documented_part(prompt: str, completion: str, expected: Verification) -> None:
    task = task_of(prompt)
    verification = FAMILIES[task.family].verify(task, completion)
    assert verification.correctness == pytest.approx(expected.correctness)
    assert verification.coverage == pytest.approx(expected.coverage)
