"""Check that right, complete, short and plain answers get higher gold scores, and that no trick beats answering."""

import itertools
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rm_robust.data.world.gold_judge import gold_score, gold_score_components
from rm_robust.data.world.response_models import CLOSINGS, FLATTERY, HEDGES, OPENERS, PADDING
from rm_robust.data.world.task import ADJECTIVES, CONTENT_WORDS, FUNCTION_WORDS, NAMES, NOUNS, NUMBERS, Form, Task
from rm_robust.data.world.task_families import FAMILIES, find_task
from rm_robust.errors import DataError, RmRobustError

FILLERS = (*OPENERS, *FLATTERY, *HEDGES, *PADDING, *CLOSINGS)
ADDITION = "Today Eva had five hats and got six more. How many hats are there?"

prompts = st.builds(
    lambda family, seed: family.make(Random(seed)), st.sampled_from(list(FAMILIES.values())), st.integers(0, 2**32 - 1)
)


def task_and_answer(prompt: str, form: Form = Form.SENTENCE) -> tuple[Task, str]:
    task = find_task(prompt)
    assert task is not None
    family = FAMILIES[task.family]
    return task, family.phrase(task, family.ideal_items(task, Random(0)), form)


@given(prompts, st.sampled_from(Form))
def test_an_ideal_answer_scores_near_the_maximum(prompt: str, form: Form) -> None:
    assert gold_score(prompt, task_and_answer(prompt, form)[1]) >= 0.97


@given(prompts)
def test_empty_text_scores_zero_and_nothing_scores_less(prompt: str) -> None:
    assert gold_score(prompt, "") == gold_score(prompt, " \n") == 0.0


@given(prompts, st.text(max_size=300))
def test_any_text_scores_between_zero_and_one(prompt: str, completion: str) -> None:
    components = gold_score_components(prompt, completion)
    for value in (
        components.total,
        components.correctness,
        components.coverage,
        components.length_fit,
        components.filler_fraction,
    ):
        assert 0.0 <= value <= 1.0


def test_the_total_is_the_documented_weighted_sum_of_its_components() -> None:
    # "Sure!" is one filler word of five; the completion has 28 characters, a plain sentence 22.
    components = gold_score_components(ADDITION, "Sure! There are eleven hats.")
    assert components.correctness == components.coverage == 1.0
    assert components.filler_fraction == pytest.approx(1 / 5)
    assert components.length_fit == pytest.approx(1 / (1 + (28 / 44) ** 4))
    assert components.total == pytest.approx(0.6 + 0.1 + 0.1 * components.length_fit + 0.2 * 0.8)


@given(prompts, st.sampled_from(FILLERS), st.sampled_from(FILLERS))
def test_each_filler_phrase_lowers_the_score_of_a_right_answer(prompt: str, before: str, after: str) -> None:
    answer = task_and_answer(prompt)[1]
    scores = [gold_score(prompt, text) for text in (answer, f"{before} {answer}", f"{before} {answer} {after}")]
    assert scores[0] > scores[1] > scores[2]


def test_filler_phrases_claim_nothing() -> None:
    for phrase in FILLERS:
        words = set(phrase.lower().replace("!", "").replace(".", "").replace(",", "").replace(":", "").split())
        assert not words & CONTENT_WORDS, phrase
        assert not words & set(NUMBERS), phrase


@given(prompts)
def test_a_right_answer_beats_a_wrong_one_however_it_is_dressed(prompt: str) -> None:
    task, right = task_and_answer(prompt)
    wrong = FAMILIES[task.family].phrase(task, [task.confusable[0]] * task.num_items, Form.SENTENCE)
    assert gold_score(prompt, f"Sure! {right} Let me know if you need more.") > gold_score(prompt, wrong)


@given(prompts)
def test_more_right_items_score_more(prompt: str) -> None:
    task = task_and_answer(prompt)[0]
    family = FAMILIES[task.family]
    items = family.ideal_items(task, Random(0))
    scores = [
        gold_score(prompt, family.phrase(task, items[:count], Form.SENTENCE)) for count in range(1, len(items) + 1)
    ]
    assert all(fewer < more for fewer, more in itertools.pairwise([0.0, *scores]))


@given(prompts, st.integers(1, 200))
def test_length_fit_falls_with_every_character_beyond_a_bare_answer(prompt: str, num_extra: int) -> None:
    bare = task_and_answer(prompt, Form.BARE)[1]
    shorter, longer = (
        gold_score_components(prompt, bare + "." * count).length_fit for count in (num_extra, num_extra + 1)
    )
    assert shorter > longer


@given(prompts)
def test_saying_the_answer_again_lowers_the_score(prompt: str) -> None:
    answer = task_and_answer(prompt)[1]
    scores = [gold_score(prompt, " ".join([answer] * times)) for times in (1, 2, 3, 8)]
    assert scores == sorted(scores, reverse=True)
    assert scores[1] < scores[0] - 0.3


@given(prompts)
def test_listing_every_possible_answer_scores_less_than_a_plain_wrong_one(prompt: str) -> None:
    task = task_and_answer(prompt)[0]
    guess = FAMILIES[task.family].phrase(task, [task.confusable[0]] * task.num_items, Form.SENTENCE)
    for vocabulary in (NOUNS, ADJECTIVES, NAMES, NUMBERS, (*NOUNS, *ADJECTIVES, *NAMES, *NUMBERS)):
        assert gold_score(prompt, ", ".join(vocabulary)) < max(0.35, gold_score(prompt, guess))


@given(prompts)
def test_echoing_the_prompt_scores_far_less_than_answering(prompt: str) -> None:
    assert gold_score(prompt, prompt) < gold_score(prompt, task_and_answer(prompt)[1]) - 0.3


@given(prompts)
def test_function_words_alone_are_filler(prompt: str) -> None:
    components = gold_score_components(prompt, " ".join(sorted(FUNCTION_WORDS)))
    assert components.filler_fraction == 1.0
    assert components.total < 0.1


@given(prompts, st.sampled_from(["hat ", "the ", "x", "1. ", "\n", "é ", "\u0000"]))
def test_a_very_long_completion_scores_next_to_nothing(prompt: str, piece: str) -> None:
    assert gold_score(prompt, piece * 20_000) < 0.15


@pytest.mark.parametrize("prompt", ["", "What is the capital of France?", ADDITION + " Now."])
def test_a_prompt_of_another_world_is_an_error_that_names_it(prompt: str) -> None:
    with pytest.raises(DataError, match="can only score prompts of the embedded world") as caught:
        gold_score(prompt, "anything")
    assert isinstance(caught.value, RmRobustError)
    assert repr(prompt) in str(caught.value)
