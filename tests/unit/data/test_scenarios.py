"""Check which prompts and response models each scenario holds, and that everything left out is counted."""

from collections.abc import Callable
from dataclasses import replace

import pytest

from rm_robust.data.records import ConversationGroup, NamedResponse
from rm_robust.data.scenarios import Scenarios, build_scenarios, check_disjoint, choose_validation_prompts, manifest
from rm_robust.errors import DataError

TRAINING_MODELS, UNSEEN_MODELS = ["t1", "t2", "t3", "t4", "t5"], {"u1", "u2", "u3"}
NUM_PROMPTS = 12
VALIDATION = {"p08", "p09", "p10", "p11"}
NAMES = ["train", "in_domain", "prompt_disjoint", "response_disjoint", "mutual_disjoint"]


def response(
    prompt_id: str, model: str, *, completion: str | None = None, gold_score: float | None = None
) -> NamedResponse:
    number = int(prompt_id[1:]) * 10 + int(model[1:])
    prompt = [{"role": "user", "content": f"prompt {prompt_id}"}]
    return NamedResponse(
        prompt_id,
        prompt,
        model,
        completion or f"{model} on {prompt_id}",
        float(number) if gold_score is None else gold_score,
    )


def responses() -> list[NamedResponse]:
    return [
        response(f"p{p:02}", model) for p in range(NUM_PROMPTS) for model in [*TRAINING_MODELS, *sorted(UNSEEN_MODELS)]
    ]


def build(rows: list[NamedResponse] | None = None, *, seed: int = 0) -> Scenarios:
    return build_scenarios(
        rows or responses(), unseen_models=UNSEEN_MODELS, validation_prompt_ids=VALIDATION, seed=seed
    )


def change(
    rows: list[NamedResponse], prompt_id: str, to: Callable[[NamedResponse], NamedResponse | None]
) -> list[NamedResponse]:
    """Return `rows` with every response to `prompt_id` replaced or left out."""
    changed = [to(row) if row.prompt_id == prompt_id else row for row in rows]
    return [row for row in changed if row is not None]


def prompts(scenarios: Scenarios, name: str) -> set[str]:
    return {group.group_id for group in scenarios.sets[name]}


def models(groups: list[ConversationGroup]) -> set[str]:
    return {model for group in groups for model in group.models}


def test_every_prompt_is_in_the_sets_of_its_side() -> None:
    scenarios = build()
    training = {f"p{p:02}" for p in range(8)}
    assert scenarios.dropped == {}
    for name in ("train", "in_domain", "response_disjoint"):
        assert prompts(scenarios, name) == training
    for name in ("prompt_disjoint", "mutual_disjoint"):
        assert prompts(scenarios, name) == VALIDATION


def test_response_models_are_on_their_side_and_rankings_hold_all_of_them() -> None:
    sets = build().sets
    for name in ("train", "in_domain", "prompt_disjoint"):
        assert models(sets[name]) <= set(TRAINING_MODELS)
    assert all(group.models == TRAINING_MODELS for group in sets["prompt_disjoint"])
    for name in ("response_disjoint", "mutual_disjoint"):
        assert all(group.models == sorted(UNSEEN_MODELS) for group in sets[name])


def test_train_and_in_domain_pairs_of_a_prompt_have_no_response_in_common() -> None:
    sets = build().sets
    for train, held_out in zip(sets["train"], sets["in_domain"], strict=True):
        assert train.group_id == held_out.group_id
        assert set(train.completions).isdisjoint(held_out.completions)
        assert len({*train.models, *held_out.models}) == 4


def test_the_better_of_a_pair_by_gold_is_chosen() -> None:
    gold = {row.completion: row.gold_score for row in responses()}
    for name in ("train", "in_domain"):
        for group in build().sets[name]:
            chosen, rejected = group.completions
            assert gold[chosen] > gold[rejected]
            assert group.gold_scores == [1.0, 0.0]


def test_rankings_keep_gold_scores_beside_their_completions() -> None:
    gold = {row.completion: row.gold_score for row in responses()}
    for name in ("prompt_disjoint", "response_disjoint", "mutual_disjoint"):
        for group in build().sets[name]:
            assert group.gold_scores == [gold[completion] for completion in group.completions]


def test_pairs_are_drawn_from_all_training_models_and_by_the_seed() -> None:
    assert models(build().sets["train"]) == set(TRAINING_MODELS)
    drawn = {seed: [tuple(group.completions) for group in build(seed=seed).sets["train"]] for seed in (0, 0, 1)}
    assert drawn[0] == [tuple(group.completions) for group in build(seed=0).sets["train"]]
    assert drawn[0] != drawn[1]


def test_the_order_of_the_rows_does_not_matter() -> None:
    assert build(list(reversed(responses()))) == build()


def test_a_prompt_that_occurs_twice_under_two_ids_is_kept_once_and_counted() -> None:
    twin = [replace(row, prompt_id="p99") for row in responses() if row.prompt_id == "p00"]
    scenarios = build([*responses(), *twin])
    assert scenarios.dropped == {"duplicate prompts": 1}
    assert scenarios.sets == build().sets


def test_a_training_prompt_that_is_a_validation_prompt_too_cannot_leak() -> None:
    """p08 is a validation prompt; the same text as a training prompt p99 would be a leak."""
    twin = [replace(row, prompt_id="p99") for row in responses() if row.prompt_id == "p08"]
    scenarios = build([*responses(), *twin])
    texts = {name: {group.prompt[0]["content"] for group in groups} for name, groups in scenarios.sets.items()}
    assert texts["train"].isdisjoint(texts["prompt_disjoint"] | texts["mutual_disjoint"])


def test_identical_training_responses_take_the_prompt_out_of_every_set() -> None:
    for prompt_id in ("p00", "p08"):
        rows = change(
            responses(), prompt_id, lambda row: replace(row, completion="same") if row.model in ("t1", "t2") else row
        )
        scenarios = build(rows)
        assert scenarios.dropped == {"prompts with identical training-model responses": 1}
        assert all(prompt_id not in prompts(scenarios, name) for name in NAMES)


def test_too_few_training_responses_take_the_prompt_out_of_every_set() -> None:
    scenarios = build(change(responses(), "p00", lambda row: None if row.model in ("t1", "t2") else row))
    assert scenarios.dropped == {"prompts with fewer than 4 training-model responses": 1}
    assert all("p00" not in prompts(scenarios, name) for name in NAMES)


def test_a_tied_training_pair_takes_the_prompt_out_of_every_set() -> None:
    scenarios = build(
        change(responses(), "p00", lambda row: replace(row, gold_score=1.0) if row.model in TRAINING_MODELS else row)
    )
    assert scenarios.dropped == {"prompts with tied gold scores in the training pair": 1}
    assert all("p00" not in prompts(scenarios, name) for name in NAMES)


def test_a_tied_in_domain_pair_is_dropped_alone_and_counted() -> None:
    (held_out,) = [group for group in build().sets["in_domain"] if group.group_id == "p00"]
    scenarios = build(
        change(
            responses(),
            "p00",
            lambda row: replace(row, gold_score=-5.0) if row.completion in held_out.completions else row,
        )
    )
    assert scenarios.dropped == {"in-domain pairs with tied gold scores": 1}
    assert [name for name in NAMES if "p00" in prompts(scenarios, name)] == ["train", "response_disjoint"]


def test_unseen_rankings_that_cannot_be_made_are_dropped_alone_and_counted() -> None:
    few = build(change(responses(), "p00", lambda row: None if row.model in ("u1", "u2") else row))
    same = build(
        change(responses(), "p08", lambda row: replace(row, completion="same") if row.model in UNSEEN_MODELS else row)
    )
    assert few.dropped == {"unseen-model rankings of fewer than 2 responses": 1}
    assert [name for name in NAMES if "p00" in prompts(few, name)] == ["train", "in_domain"]
    assert same.dropped == {"unseen-model rankings with identical responses": 1}
    assert [name for name in NAMES if "p08" in prompts(same, name)] == ["prompt_disjoint"]


def test_two_prompts_under_one_id_are_refused() -> None:
    other = replace(response("p00", "t1"), prompt=[{"role": "user", "content": "another"}])
    with pytest.raises(DataError, match="'p00' names two prompts"):
        build([*responses(), other])


def test_a_split_without_unseen_models_is_refused_by_the_empty_set() -> None:
    with pytest.raises(DataError, match=r"'response_disjoint' is empty: check unseen_models \['nobody'\]"):
        build_scenarios(responses(), unseen_models={"nobody"}, validation_prompt_ids=VALIDATION, seed=0)


def test_shared_prompts_and_models_on_the_wrong_side_are_noticed() -> None:
    sets = build().sets
    leak = {
        **sets,
        "mutual_disjoint": [*sets["mutual_disjoint"], replace(sets["response_disjoint"][0], group_id="other")],
    }
    with pytest.raises(DataError, match="1 prompts of 'mutual_disjoint' are training prompts too"):
        check_disjoint(leak, UNSEEN_MODELS)
    with pytest.raises(DataError, match=r"\['t1'\] are on the wrong side in"):
        check_disjoint(sets, {*UNSEEN_MODELS, "t1"})


def test_validation_prompts_are_the_asked_share_and_depend_on_the_seed_alone() -> None:
    rows = responses()
    chosen = choose_validation_prompts(rows, fraction=0.25, seed=0)
    assert len(chosen) == 3
    assert chosen == choose_validation_prompts(list(reversed(rows)), fraction=0.25, seed=0)
    assert chosen <= {row.prompt_id for row in rows}
    assert len(choose_validation_prompts(rows, fraction=0.001, seed=0)) == 1
    assert len({frozenset(choose_validation_prompts(rows, fraction=0.25, seed=seed)) for seed in range(10)}) > 1


def test_the_manifest_counts_and_a_hash_changes_with_the_content() -> None:
    described = manifest(build())
    assert [described[name]["num_groups"] for name in NAMES] == [8, 8, 4, 8, 4]
    assert [described[name]["num_completions"] for name in NAMES] == [16, 16, 20, 24, 12]
    assert described["mutual_disjoint"]["models"] == ["u1", "u2", "u3"]
    assert described["dropped"] == {}
    other = manifest(build(change(responses(), "p00", lambda row: replace(row, completion=row.completion + "!"))))
    assert [described[name]["sha256"] != other[name]["sha256"] for name in NAMES] == [True, True, False, True, False]
