"""The one inference path: plain transformers' scores, alone and in any batch, from unaltered checkpoints."""

import json
from pathlib import Path
from random import Random

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

from rm_robust.data.records import TokenGroup
from rm_robust.errors import CheckpointError, ScoringError
from rm_robust.models.checkpoint import MANIFEST_NAME, commit_checkpoint
from rm_robust.models.own_forward import probe_conversation
from rm_robust.models.scorer import RewardScorer
from tests.support.tiny_models import random_group
from tests.support.tiny_reward_model import NUM_POSITIONS, save_tiny_reward_model

GROUPS = [random_group(Random(seed), num_completions=1 + seed % 4) for seed in range(12)]


@pytest.fixture(scope="module")
def checkpoint_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_reward_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def scorer(checkpoint_dir: Path) -> RewardScorer:
    return load(checkpoint_dir)


def load(checkpoint_dir: Path, *, max_length_tokens: int = 64) -> RewardScorer:
    return RewardScorer.load(checkpoint_dir, device="cpu", dtype="float32", max_length_tokens=max_length_tokens)


def test_scores_are_those_of_plain_transformers_alone_and_in_any_batch(
    checkpoint_dir: Path, scorer: RewardScorer
) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(checkpoint_dir).double()
    with torch.inference_mode():
        expected = [
            [model(input_ids=torch.tensor([g.prompt_ids + ids])).logits.item() for ids in g.completion_ids]
            for g in GROUPS
        ]
    alone = [scorer.score_groups([group])[0] for group in GROUPS]
    shuffled = Random(1).sample(range(len(GROUPS)), len(GROUPS))
    together = dict(zip(shuffled, scorer.score_groups([GROUPS[i] for i in shuffled]), strict=True))
    for i, scores in enumerate(expected):
        assert alone[i] == pytest.approx(scores, abs=1e-4)  # float32 itself is 2e-5 away from float64 here
        assert together[i] == pytest.approx(scores, abs=1e-4)


def test_the_token_budget_of_a_batch_does_not_change_scores_norms_or_order(scorer: RewardScorer) -> None:
    together = scorer.score_groups_with_norms(GROUPS, max_tokens_per_batch=10_000)
    for budget in (1, 30):
        for part, expected in zip(
            scorer.score_groups_with_norms(GROUPS, max_tokens_per_batch=budget), together, strict=True
        ):
            assert part.scores == pytest.approx(expected.scores, abs=1e-4)
            assert part.norms_before_final_norm == pytest.approx(expected.norms_before_final_norm, rel=1e-4)
            assert part.norms_after_final_norm == pytest.approx(expected.norms_after_final_norm, rel=1e-4)


def test_nothing_to_score_gives_no_scores(scorer: RewardScorer) -> None:
    assert scorer.score_groups([]) == []


def test_the_limit_is_on_prompt_and_longest_completion_together(scorer: RewardScorer) -> None:
    scorer.score_groups([TokenGroup([5] * 30, [[6] * 34, [7]])])
    with pytest.raises(ScoringError, match="Input 1 has 65 tokens .*limit is 64"):
        scorer.score_groups([GROUPS[0], TokenGroup([5] * 30, [[7], [6] * 35])])


def test_the_scorer_names_its_checkpoint(checkpoint_dir: Path, scorer: RewardScorer) -> None:
    assert scorer.checkpoint_id == json.loads((checkpoint_dir / MANIFEST_NAME).read_text())["content_sha256"]
    assert scorer.model_name == "tiny"


def copy_with(
    source: Path,
    target: Path,
    *,
    template_sha256: str | None = None,
    kind: str = "reward_model",
    poisoned: tuple[str, int] | None = None,
) -> Path:
    """Commit the checkpoint again; `poisoned` names a weight and the row of it that becomes infinite."""
    manifest = json.loads((source / MANIFEST_NAME).read_text())

    def write(folder: Path) -> None:
        for path in source.iterdir():
            if path.name != MANIFEST_NAME:
                (folder / path.name).write_bytes(path.read_bytes())
        if poisoned:
            state = load_file(folder / "model.safetensors")
            state[poisoned[0]][poisoned[1]] = torch.inf
            save_file(state, folder / "model.safetensors", metadata={"format": "pt"})

    commit_checkpoint(
        target, write, kind=kind, template_sha256=template_sha256 or manifest["template_sha256"], training={}
    )  # type: ignore[arg-type]
    return target


def test_a_checkpoint_trained_with_another_template_is_refused(checkpoint_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="was trained with template sha256:other, its tokenizer now has sha256:"):
        load(copy_with(checkpoint_dir, tmp_path / "other", template_sha256="sha256:other"))


def test_a_policy_is_refused_as_a_scorer(checkpoint_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is a policy checkpoint"):
        load(copy_with(checkpoint_dir, tmp_path / "policy", kind="policy"))


def test_a_longer_limit_than_the_model_has_positions_is_refused(checkpoint_dir: Path) -> None:
    with pytest.raises(
        CheckpointError, match=f"max_length_tokens={NUM_POSITIONS + 1} exceeds the {NUM_POSITIONS} positions"
    ):
        load(checkpoint_dir, max_length_tokens=NUM_POSITIONS + 1)


def test_a_score_that_is_not_finite_is_an_error_that_names_its_input(checkpoint_dir: Path, tmp_path: Path) -> None:
    probe = probe_conversation(load(checkpoint_dir).chat)
    in_probe = {*probe.prompt_ids, *(token_id for ids in probe.completion_ids for token_id in ids)}
    token_id = next(token_id for token_id in GROUPS[0].prompt_ids if token_id not in in_probe)
    poisoned = copy_with(checkpoint_dir, tmp_path / "poisoned", poisoned=("model.embed_tokens.weight", token_id))
    with pytest.raises(ScoringError, match="Input 0 got the scores .*not finite"):
        load(poisoned).score_groups(GROUPS[:1])


def test_a_model_that_gives_no_finite_score_at_all_is_refused_at_load(checkpoint_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="computes scores that are not finite, with its own code in transformers"):
        load(copy_with(checkpoint_dir, tmp_path / "poisoned", poisoned=("score.weight", 0)))
