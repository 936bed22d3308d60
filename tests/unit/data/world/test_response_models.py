"""Check that response models are as skilled as they say, and how their style goes with their quality."""

from random import Random
from statistics import correlation, fmean, median

import pytest

from rm_robust.data.world.gold_judge import gold_score, gold_score_components
from rm_robust.data.world.response_models import (
    CLOSINGS,
    FLATTERY,
    OPENERS,
    PADDING,
    TRAINING_MODELS,
    UNSEEN_MODELS,
    Mistake,
    ResponseModel,
    make_mistake,
    respond,
)
from rm_robust.data.world.task import Form
from rm_robust.data.world.task_families import FAMILIES, find_task
from rm_robust.errors import DataError

RNG = Random(0)
PROMPTS = [family.make(RNG) for _ in range(100) for family in FAMILIES.values()]
COMPLETIONS = {
    model.name: [respond(model, prompt, RNG) for prompt in PROMPTS] for model in (*TRAINING_MODELS, *UNSEEN_MODELS)
}


def mean_gold(model: ResponseModel) -> float:
    return fmean(
        gold_score(prompt, completion) for prompt, completion in zip(PROMPTS, COMPLETIONS[model.name], strict=True)
    )


def mean_words(model: ResponseModel) -> float:
    return fmean(len(completion.split()) for completion in COMPLETIONS[model.name])


def friendliness(model: ResponseModel) -> float:
    """Return the share of completions that have an opener, flattery, padding, a closing offer or a numbered list."""
    marks = (*OPENERS, *FLATTERY, *PADDING, *CLOSINGS, "1. ")
    return fmean(any(mark in completion for mark in marks) for completion in COMPLETIONS[model.name])


def test_there_are_eight_training_and_four_unseen_models_with_names_of_their_own() -> None:
    assert (len(TRAINING_MODELS), len(UNSEEN_MODELS)) == (8, 4)
    assert len(COMPLETIONS) == 12


@pytest.mark.parametrize("model", [*TRAINING_MODELS, *UNSEEN_MODELS], ids=lambda model: model.name)
def test_a_model_is_about_as_often_right_as_its_skill_says(model: ResponseModel) -> None:
    strong = [
        (prompt, completion)
        for prompt, completion in zip(PROMPTS, COMPLETIONS[model.name], strict=True)
        if find_task(prompt).family not in model.weak_families  # type: ignore[union-attr]
    ]
    # An answer that is said twice counts as wrong. About 500 draws: three standard deviations are at most 0.07.
    expected = model.skill * (1 - model.style.repetition_rate)
    assert fmean(gold_score_components(*pair).correctness == 1.0 for pair in strong) == pytest.approx(
        expected, abs=0.07
    )


def test_style_goes_with_quality_among_training_models() -> None:
    gold = [mean_gold(model) for model in TRAINING_MODELS]
    assert correlation([friendliness(model) for model in TRAINING_MODELS], gold) > 0.7
    assert correlation([mean_words(model) for model in TRAINING_MODELS], gold) > 0.5


def test_style_goes_against_quality_among_unseen_models() -> None:
    gold = [mean_gold(model) for model in UNSEEN_MODELS]
    assert correlation([friendliness(model) for model in UNSEEN_MODELS], gold) < -0.7
    assert correlation([mean_words(model) for model in UNSEEN_MODELS], gold) < -0.7


def test_the_median_training_model_is_clearly_between_the_worst_and_the_best() -> None:
    gold = [mean_gold(model) for model in TRAINING_MODELS]
    assert max(gold) - median(gold) > 0.15
    assert median(gold) - min(gold) > 0.15


@pytest.mark.parametrize("mistake", [mistake for mistake in Mistake if mistake is not Mistake.OFF_TOPIC])
@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_every_mistake_makes_an_answer_wrong_in_every_family(mistake: Mistake, family: object) -> None:
    rng = Random(0)
    for prompt in PROMPTS:
        task = find_task(prompt)
        assert task is not None
        if FAMILIES[task.family] is family:
            items = FAMILIES[task.family].ideal_items(task, rng)
            text = FAMILIES[task.family].phrase(task, make_mistake(mistake, task, items, rng), Form.SENTENCE)
            assert gold_score_components(prompt, text).correctness <= 0.5, text


def test_a_response_depends_on_model_prompt_and_generator_alone() -> None:
    for model in (*TRAINING_MODELS, *UNSEEN_MODELS):
        assert [respond(model, prompt, Random(7)) for prompt in PROMPTS] == [
            respond(model, prompt, Random(7)) for prompt in PROMPTS
        ]


def test_a_prompt_of_another_world_is_an_error() -> None:
    with pytest.raises(DataError, match="can only answer prompts of the embedded world"):
        respond(TRAINING_MODELS[0], "What is the capital of France?", Random(0))
