"""Test scorers, ensembles and calibration without Serve.

An item that fails does not affect the rest of its batch, and the rest of a batch does not change an item's score.
"""

from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from rm_robust.data.chat import ChatFormat
from rm_robust.data.records import TokenGroup
from rm_robust.errors import CheckpointError
from rm_robust.models.checkpoint import commit_checkpoint, read_manifest
from rm_robust.models.packing import share_prompts
from rm_robust.scoring.contract import ScoreResult
from serve.batching.front import aggregate, calibrated, ensemble_of
from serve.scorers.checkpoint_scorer import CheckpointScorer
from serve.scorers.judge import source_sha256
from serve.settings import Aggregation, EnsembleSettings, ModelSettings
from serve.work import Refusal, Scored, ServedModel
from tests.support.tiny_reward_model import WORDS, save_tiny_reward_model

POISON = "river"


def group(chat: ChatFormat, *completions: str) -> TokenGroup:
    return TokenGroup(chat.prompt_ids("red"), [chat.completion_ids(completion) for completion in completions])


@pytest.fixture(scope="module")
def poisoned_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the directory of a reward model whose score is NaN for every text with the word `river` in it."""
    source = save_tiny_reward_model(tmp_path_factory.mktemp("models") / "tiny")
    (token_id,) = ChatFormat.load(source).tokenizer(POISON, add_special_tokens=False)["input_ids"]

    def write(target: Path) -> None:
        for path in source.iterdir():
            if path.name != "rm_robust_manifest.json":
                (target / path.name).write_bytes(path.read_bytes())
        weights = load_file(source / "model.safetensors")
        weights["model.embed_tokens.weight"][token_id] = torch.nan
        save_file(weights, target / "model.safetensors", metadata={"format": "pt"})

    commit_checkpoint(
        source.parent / "poisoned",
        write,
        kind="reward_model",
        template_sha256=read_manifest(source).template_sha256,
        training={},
    )
    return source.parent / "poisoned"


def scorer_on(checkpoint_dir: Path, **changed: Any) -> CheckpointScorer:
    return CheckpointScorer(
        ModelSettings(model_name="m", checkpoint_dir=checkpoint_dir, **changed), checkpoint_dir, generation=1
    )


def test_a_score_that_is_not_finite_fails_its_own_item_only(poisoned_dir: Path) -> None:
    scorer, chat = scorer_on(poisoned_dir), ChatFormat.load(poisoned_dir)
    first, last = group(chat, "blue", "green"), group(chat, "stone")
    results = scorer.score([first, group(chat, "blue", POISON), last])
    assert isinstance(results[1], str)
    assert "not finite" in results[1]
    assert [results[0], results[2]] == [scorer.score([first])[0], scorer.score([last])[0]]


@pytest.mark.parametrize("share_prompts", [True, False])
def test_an_item_scores_the_same_alone_and_inside_any_batch(poisoned_dir: Path, share_prompts: bool) -> None:
    rng = Random(0)
    words = [word for word in WORDS if word != POISON]
    chat = ChatFormat.load(poisoned_dir)
    groups = [
        group(chat, *(" ".join(rng.choices(words, k=rng.randint(0, 80))) for _ in range(rng.randint(1, 5))))
        for _ in range(20)
    ]
    groups += [
        TokenGroup(chat.prompt_ids(f"blue {index % 4}"), group_.completion_ids) for index, group_ in enumerate(groups)
    ]
    scorer = scorer_on(poisoned_dir, share_prompts=share_prompts)
    scores_alone = [scorer.score([one_group])[0] for one_group in groups]
    order = rng.sample(range(40), 40)
    for index, scores in zip(order, scorer.score([groups[i] for i in order]), strict=True):
        assert scores == pytest.approx(scores_alone[index], abs=1e-5)


def test_equal_prompts_become_one_group_and_every_completion_keeps_its_place() -> None:
    groups = [TokenGroup([1, 2], [[3], [4]]), TokenGroup([5], [[6]]), TokenGroup([1, 2], [[7]])]
    shared_groups, positions = share_prompts(groups)
    assert shared_groups == [TokenGroup([1, 2], [[3], [4], [7]]), TokenGroup([5], [[6]])]
    assert positions == [(0, 0), (1, 0), (0, 2)]
    assert groups[0].completion_ids == [[3], [4]]


def test_a_policy_checkpoint_is_refused(poisoned_dir: Path) -> None:
    policy_dir = poisoned_dir.parent / "policy"
    commit_checkpoint(
        policy_dir,
        lambda target: (target / "config.json").touch(),
        kind="policy",
        template_sha256="sha256:0",
        training={},
    )
    with pytest.raises(CheckpointError, match="is a policy checkpoint"):
        scorer_on(policy_dir)


def test_the_judges_identity_changes_with_its_code(tmp_path: Path) -> None:
    (tmp_path / "judge.py").write_text("WEIGHT = 1\n")
    before = source_sha256(tmp_path)
    assert source_sha256(tmp_path) == before
    (tmp_path / "judge.py").write_text("WEIGHT = 2\n")
    assert source_sha256(tmp_path) != before


AGGREGATIONS = [
    (Aggregation.MEAN, 2.0),
    (Aggregation.MIN, -1.0),
    (Aggregation.UNCERTAINTY_WEIGHTED, 2.0 - 0.5 * 14 / 3),
]


@pytest.mark.parametrize(("aggregation", "expected"), AGGREGATIONS)
def test_members_scores_become_one_as_the_aggregation_says(aggregation: Aggregation, expected: float) -> None:
    ensemble = EnsembleSettings(
        model_name="e", members=("a", "b", "c"), aggregation=aggregation, uncertainty_weight=0.5
    )
    assert aggregate([-1.0, 4.0, 3.0], ensemble) == pytest.approx(expected)  # mean 2, squared deviations 9 + 4 + 1


def test_a_calibrated_score_is_in_standard_deviations_from_the_mean() -> None:
    served = ServedModel("m", "sha256:0", None, None, calibration=(2.0, 4.0))
    outcome = calibrated(Scored(served, [ScoreResult(scores=[2.0, 10.0, -2.0])]))
    assert isinstance(outcome, Scored)
    assert outcome.results[0].scores == [0.0, 2.0, -1.0]


def test_a_model_without_held_out_scores_is_not_calibrated() -> None:
    outcome = calibrated(Scored(ServedModel("m", "sha256:0", None, None), [ScoreResult(scores=[2.0])]))
    assert isinstance(outcome, Refusal)
    assert (outcome.status, outcome.type) == (422, "invalid_request")


def test_the_identity_of_an_ensemble_changes_with_any_member_and_with_how_they_are_aggregated() -> None:
    mean = EnsembleSettings(model_name="e", members=("a", "b"))
    members = [ServedModel(name, f"sha256:{name}", None, limit) for name, limit in (("a", 512), ("b", 256))]
    other = [members[0], ServedModel("b", "sha256:c", None, 256)]
    ids = [
        ensemble_of(*arguments).checkpoint
        for arguments in (
            (mean, members),
            (mean, other),
            (mean.model_copy(update={"aggregation": Aggregation.MIN}), members),
        )
    ]
    assert len(set(ids)) == 3
    assert ensemble_of(mean, members).max_length_tokens == 256
