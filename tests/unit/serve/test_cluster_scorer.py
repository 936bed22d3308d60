"""Test how long the scorer inside the cluster keeps trying.

The handle is one of our own, and only the scorer's waits move its clock.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, GetTimeoutError
from ray.serve.exceptions import BackPressureError

from rm_robust.errors import RefusedInputError, ScorerUnavailableError
from rm_robust.scoring.contract import ScoreInput, ScoreReply, ScoreRequest, ScoreResult
from serve.cluster_scorer import ClusterScorer
from serve.work import Refusal

INPUTS = [ScoreInput(prompt="p", completions=["a", "b"])]
FULL = Refusal(429, "overloaded", "full", 1)
Outcome = ScoreReply | Refusal | Exception


@dataclass
class Handle:
    """Answers every call with `outcome_at(now_s)`; `now_s` is in seconds since the first call."""

    outcome_at: Callable[[float], Outcome]
    now_s: float = 0.0
    num_calls: int = 0
    score: "Handle" = field(init=False)

    def __post_init__(self) -> None:
        self.score = self

    def remote(self, request: ScoreRequest) -> "Handle":
        self.num_calls += 1
        return self

    def result(self, *, timeout_s: float) -> Any:
        outcome = self.outcome_at(self.now_s)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds


def good_reply() -> ScoreReply:
    return ScoreReply(model="proxy", checkpoint="sha256:a", results=[ScoreResult(scores=[1.0, 2.0])])


@pytest.fixture
def scorer_on(monkeypatch: pytest.MonkeyPatch) -> Callable[[Handle], ClusterScorer]:
    def make(handle: Handle) -> ClusterScorer:
        monkeypatch.setattr("serve.cluster_scorer.ray_serve.get_app_handle", lambda _: handle)
        monkeypatch.setattr("serve.cluster_scorer.time.sleep", handle.sleep)
        return ClusterScorer("app", "proxy")

    return make


@pytest.mark.parametrize(
    "failure", [FULL, Refusal(503, "unavailable", "no replica"), BackPressureError(9, 9), ActorDiedError()]
)
def test_a_service_that_is_full_or_away_for_a_minute_costs_no_score(
    failure: Outcome, scorer_on: Callable[[Handle], ClusterScorer]
) -> None:
    for seed in range(20):
        random.seed(seed)
        handle = Handle(lambda now_s: failure if now_s < 60 else good_reply())
        assert scorer_on(handle).score(INPUTS).scores == [[1.0, 2.0]]
        assert handle.now_s < 60 + 11


def test_one_that_is_away_for_ever_is_an_error_after_some_minutes(scorer_on: Callable[[Handle], ClusterScorer]) -> None:
    handle = Handle(lambda _: FULL)
    with pytest.raises(
        ScorerUnavailableError, match="inputs 0 to 0 of 1 by app/proxy failed: 19 attempts, the last one: 429: full"
    ):
        scorer_on(handle).score(INPUTS)
    assert 60 < handle.now_s < 123 + 18


def test_one_that_does_not_answer_is_asked_eight_times_more(scorer_on: Callable[[Handle], ClusterScorer]) -> None:
    handle = Handle(lambda _: GetTimeoutError("300 s"))
    with pytest.raises(ScorerUnavailableError, match="9 attempts"):
        scorer_on(handle).score(INPUTS)
    assert handle.num_calls == 9


@pytest.mark.parametrize(
    "refusal", [Refusal(500, "scoring_failed", "not finite"), Refusal(422, "invalid_request", "too long")]
)
def test_what_the_completions_are_at_fault_for_is_asked_once(
    refusal: Refusal, scorer_on: Callable[[Handle], ClusterScorer]
) -> None:
    handle = Handle(lambda _: refusal)
    with pytest.raises(RefusedInputError, match=refusal.message):
        scorer_on(handle).score(INPUTS)
    assert handle.num_calls == 1
