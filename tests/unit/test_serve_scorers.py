"""Scorers and the replica around them, without Serve: one request's failure stays its own, and a hang is noticed."""

from collections.abc import Sequence
from pathlib import Path
from random import Random

import pytest
import torch
from safetensors.torch import load_file, save_file

from rm_robust.chat import ChatFormat
from rm_robust.checkpoint import commit_checkpoint, read_manifest
from rm_robust.errors import CheckpointError
from rm_robust.scoring import ScoreInput, ScoreRequest
from serve.checkpoint_scorer import CheckpointScorer
from serve.deployment import ScorerReplica
from serve.judge_scorer import source_sha256
from serve.scorer import Outcome, Refusal, Scored
from serve.settings import ScoringAppSettings
from tests.tiny_reward_model import WORDS, save_tiny_reward_model

POISON = "river"


def request(*completions: str) -> ScoreRequest:
    return ScoreRequest(inputs=[ScoreInput(prompt="red", completions=list(completions))])


def scores_of(outcome: Outcome) -> list[list[float]]:
    assert isinstance(outcome, Scored)
    return [result.scores for result in outcome.results]


@pytest.fixture(scope="module")
def poisoned_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reward model whose score is NaN for every text with the word `river` in it."""
    source = save_tiny_reward_model(tmp_path_factory.mktemp("models") / "tiny")
    (token_id,) = ChatFormat.load(source).tokenizer(POISON, add_special_tokens=False)["input_ids"]

    def write(target: Path) -> None:
        for path in source.iterdir():
            if path.name != "rm_robust_manifest.json":
                (target / path.name).write_bytes(path.read_bytes())
        weights = load_file(source / "model.safetensors")
        weights["model.embed_tokens.weight"][token_id] = torch.nan
        save_file(weights, target / "model.safetensors", metadata={"format": "pt"})

    commit_checkpoint(source.parent / "poisoned", write, kind="reward_model", template_sha256=read_manifest(source).template_sha256, training={})
    return source.parent / "poisoned"


def settings_for(checkpoint_dir: Path) -> ScoringAppSettings:
    return ScoringAppSettings(model_name="m", checkpoint_dir=checkpoint_dir)


def test_a_score_that_is_not_finite_fails_its_own_request_only(poisoned_dir: Path) -> None:
    scorer = CheckpointScorer(settings_for(poisoned_dir), poisoned_dir)
    first, poisoned, last = scorer.score_requests([request("blue", "green"), request("blue", POISON), request("stone")])
    assert isinstance(poisoned, Refusal)
    assert (poisoned.status, poisoned.type) == (500, "scoring_failed")
    assert scores_of(first) == scores_of(scorer.score_requests([request("blue", "green")])[0])
    assert scores_of(last) == scores_of(scorer.score_requests([request("stone")])[0])


def test_a_request_scores_the_same_alone_and_inside_any_batch(poisoned_dir: Path) -> None:
    rng = Random(0)
    words = [word for word in WORDS if word != POISON]
    requests = [request(*(" ".join(rng.choices(words, k=rng.randint(0, 80))) for _ in range(rng.randint(1, 5)))) for _ in range(40)]
    scorer = CheckpointScorer(settings_for(poisoned_dir), poisoned_dir)
    alone = [scores_of(scorer.score_requests([one])[0]) for one in requests]
    order = rng.sample(range(40), 40)
    for index, outcome in zip(order, scorer.score_requests([requests[i] for i in order]), strict=True):
        for found, expected in zip(scores_of(outcome), alone[index], strict=True):
            assert found == pytest.approx(expected, abs=1e-5)


def test_a_policy_checkpoint_is_refused(poisoned_dir: Path) -> None:
    policy_dir = poisoned_dir.parent / "policy"
    commit_checkpoint(policy_dir, lambda target: (target / "config.json").touch(), kind="policy", template_sha256="sha256:0", training={})
    with pytest.raises(CheckpointError, match="is a policy checkpoint"):
        CheckpointScorer(settings_for(policy_dir), policy_dir)


def test_the_judges_identity_changes_with_its_code(tmp_path: Path) -> None:
    (tmp_path / "judge.py").write_text("WEIGHT = 1\n")
    before = source_sha256(tmp_path)
    assert source_sha256(tmp_path) == before
    (tmp_path / "judge.py").write_text("WEIGHT = 2\n")
    assert source_sha256(tmp_path) != before


def test_a_batch_that_takes_too_long_fails_the_health_check_until_it_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve.deployment.STUCK_AFTER_S", -1.0)  # every batch has already taken too long

    class AsksForHealth:
        def score_requests(self, requests: Sequence[ScoreRequest]) -> list[Outcome]:
            with pytest.raises(RuntimeError, match="a batch has been running"):
                replica.check_health()
            return []

    monkeypatch.setattr("serve.deployment.load_scorer", lambda settings: AsksForHealth())
    replica = ScorerReplica(ScoringAppSettings(model_name="judge", embedded_judge=True))
    replica.check_health()
    replica._score_batch([])
    replica.check_health()
