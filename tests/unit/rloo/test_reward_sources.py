"""Scores from threads that ask small scorers: in order, in batches, with failures isolated and counted."""

import logging
import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch

from rm_robust.config.rloo import RewardSourceConfig, RlooConfig
from rm_robust.errors import ConfigError, RolloutError, ScorerUnavailableError, ScoringError
from rm_robust.rloo.advantages import StepScores
from rm_robust.rloo.metrics import score_metrics
from rm_robust.rloo.reward_requests import PromptRow
from rm_robust.rloo.reward_sources import RewardSources
from rm_robust.scoring.contract import ScoreInput, ScoreReply, ScoreResult
from tests.unit.scoring.test_client import Answer, scored, serving

K = 4
NAN = math.nan
RULES = "tests.unit.rloo.test_reward_sources"
"""The name of this module in the config of a reward function."""


class NumberScorer:
    """Scores a completion with its number: "7.5" -> 7.5.

    Completions in `poison` fail every request that they are in; those in `nan` get the score NaN.
    """

    def __init__(self, *, poison: Sequence[str] = (), nan: Sequence[str] = (), checkpoint: str = "sha256:a") -> None:
        self.poison, self.nan, self.checkpoint = set(poison), set(nan), checkpoint
        self.calls: list[list[ScoreInput]] = []
        self.before_reply: Callable[[], object] = lambda: None

    def score(self, inputs: Sequence[ScoreInput]) -> ScoreReply:
        self.calls.append(list(inputs))
        self.before_reply()
        if bad := self.poison & {completion for item in inputs for completion in item.completions}:
            raise ScoringError(f"cannot score {sorted(bad)}")
        rows = [
            [NAN if completion in self.nan else float(completion) for completion in item.completions] for item in inputs
        ]
        return ScoreReply.model_construct(
            model="m", checkpoint=self.checkpoint, results=[ScoreResult.model_construct(scores=row) for row in rows]
        )

    @property
    def num_scored(self) -> int:
        return sum(len(item.completions) for call in self.calls for item in call)


class DownScorer:
    """Fails every call with the given error."""

    def __init__(self, error: BaseException) -> None:
        self.error, self.num_calls = error, 0

    def score(self, inputs: Sequence[ScoreInput]) -> ScoreReply:
        self.num_calls += 1
        raise self.error


def settings(num_prompts: int, **changed: Any) -> RlooConfig:
    return RlooConfig(num_prompts_per_step=num_prompts, num_completions_per_prompt=K, **changed)


def prompt(index: int) -> ScoreInput:
    return ScoreInput(prompt=[{"role": "user", "content": f"p{index}"}], completions=[f"{index}.{k}" for k in range(K)])


def right(count: int) -> list[list[float]]:
    return [[float(f"{index}.{k}") for k in range(K)] for index in range(count)]


def one_step(sources: RewardSources, count: int, *, with_gold: bool = False) -> StepScores:
    step = sources.begin(with_gold=with_gold)
    for index in range(count):
        sources.submit(step, index, prompt(index), PromptRow())
    return sources.collect(step, count)


def failed_places(rows: list[list[float]]) -> set[str]:
    return {f"{index}.{k}" for index, row in enumerate(rows) for k, score in enumerate(row) if math.isnan(score)}


def same_numbers(rows: list[list[float]], expected: list[list[float]], *, but: set[str]) -> bool:
    return all(rows[p][k] == expected[p][k] for p in range(len(rows)) for k in range(K) if f"{p}.{k}" not in but)


# Reward functions that the configs of these tests name.


def length_in_prompt(messages: list[dict[str, str]], completion: str) -> float:
    messages[0]["content"] += " changed"  # the function gets a copy
    return float(len(completion) + 100 * len(messages))


def picky(messages: list[dict[str, str]], completion: str) -> Any:
    failures: dict[str, Callable[[], Any]] = {
        "0.1": lambda: 1 / 0,
        "1.0": lambda: "good",
        "1.1": lambda: "1",
        "2.2": lambda: NAN,
        "2.3": lambda: [1.0, 2.0],
    }
    return failures[completion]() if completion in failures else 1


NOT_A_FUNCTION = 3


def function_source(name: str, *, weight: float = 1.0, called: str = "") -> RewardSourceConfig:
    return RewardSourceConfig(name=called or name, weight=weight, function=f"{RULES}:{name}")


# Order, weights, batches


def test_the_reward_is_the_weighted_sum_and_gold_is_kept_apart() -> None:
    chosen = settings(3, proxy_weight=2.0, reward_sources=(function_source("length_in_prompt", weight=0.5),))
    with RewardSources(chosen, proxy=NumberScorer(), gold=NumberScorer(checkpoint="sha256:g")) as sources:
        scores = one_step(sources, 3, with_gold=True)
    # "0.1" has three characters, and there is one message
    assert scores.source_scores == {"proxy": right(3), "length_in_prompt": [[103.0] * K] * 3}
    assert scores.gold == right(3)
    assert torch.equal(
        scores.rewards_PK,
        torch.tensor([[2 * score + 51.5 for score in row] for row in right(3)], dtype=torch.float64).float(),
    )
    assert scores.num_failed == {"proxy": 0, "length_in_prompt": 0, "gold": 0}
    assert scores.checkpoints == {"proxy": "sha256:a", "gold": "sha256:g"}


def test_without_gold_the_judge_is_not_asked() -> None:
    judge = NumberScorer()
    with RewardSources(settings(2), proxy=NumberScorer(), gold=judge) as sources:
        assert one_step(sources, 2).gold is None
        assert judge.calls == []
        assert one_step(sources, 2, with_gold=True).gold == right(2)


def test_prompts_that_come_in_any_order_are_collected_by_their_index() -> None:
    order = Random(0).sample(range(32), 32)
    with RewardSources(settings(32), proxy=NumberScorer(), gold=NumberScorer()) as sources:
        step = sources.begin(with_gold=True)
        for index in order:
            sources.submit(step, index, prompt(index), PromptRow())
            time.sleep(0.001)
        scores = sources.collect(step, 32)
    assert scores.source_scores["proxy"] == right(32)
    assert scores.gold == right(32)


def test_prompts_that_come_while_a_call_is_running_are_one_call() -> None:
    proxy, is_out, may_reply = NumberScorer(), threading.Event(), threading.Event()

    def hold() -> None:
        is_out.set()
        assert may_reply.wait(30)

    proxy.before_reply = hold
    with RewardSources(settings(32), proxy=proxy, gold=None) as sources:
        step = sources.begin(with_gold=False)
        sources.submit(step, 0, prompt(0), PromptRow())
        assert is_out.wait(30)
        started_s = time.monotonic()
        for index in range(1, 32):
            sources.submit(step, index, prompt(index), PromptRow())
        assert time.monotonic() - started_s < 1, "submit does not wait for the source"
        may_reply.set()
        assert sources.collect(step, 32).source_scores["proxy"] == right(32)
    assert [len(call) for call in proxy.calls] == [1, 31]


def test_prompts_that_come_together_are_few_calls_to_each_source() -> None:
    proxy, gold = NumberScorer(), NumberScorer()
    with RewardSources(settings(32), proxy=proxy, gold=gold) as sources:
        one_step(sources, 32, with_gold=True)
    assert len(proxy.calls) <= 4
    assert len(gold.calls) <= 4


def test_a_slow_source_keeps_no_other_waiting() -> None:
    proxy, gold, proxy_is_done = NumberScorer(), NumberScorer(), threading.Event()
    proxy.before_reply = proxy_is_done.set
    gold.before_reply = lambda: proxy_is_done.wait(30)
    with RewardSources(settings(1), proxy=proxy, gold=gold) as sources:
        assert one_step(sources, 1, with_gold=True).gold == right(1)
    assert proxy_is_done.is_set()


# Failures


@pytest.mark.parametrize("way", ["poison", "nan"])
def test_five_percent_of_failed_scores_are_counted_exactly_and_no_other_is_lost(
    way: str, caplog: pytest.LogCaptureFixture
) -> None:
    bad = set(Random(1).sample([f"{index}.{k}" for index in range(50) for k in range(K)], 10))
    rule = function_source("length_in_prompt", weight=0.0)
    proxy = NumberScorer(**{way: sorted(bad)})
    with RewardSources(settings(50, reward_sources=(rule,)), proxy=proxy, gold=NumberScorer()) as sources:
        scores = one_step(sources, 50, with_gold=True)
        assert scores.num_failed == {"proxy": 10, "length_in_prompt": 0, "gold": 0}
        assert failed_places(scores.source_scores["proxy"]) == bad == failed_places(scores.rewards_PK.tolist())
        assert same_numbers(scores.source_scores["proxy"], right(50), but=bad)
        metrics = score_metrics(scores)
        assert metrics["rloo/failed_score_fraction"] == pytest.approx(0.05)
        assert metrics["rloo/num_failed_scores"] == 10
        known = [score for row in right(50) for score in row if str(score) not in bad]
        assert metrics["rloo/proxy_score_mean"] == pytest.approx(sum(known) / 190)
    assert "10 of 200 scores of proxy failed" in caplog.text


def test_a_completion_that_fails_every_request_it_is_in_fails_alone_and_soon() -> None:
    """The calls for 128 completions are one for all, four with 32, four with 8, four with 2, and two with 1."""
    proxy = NumberScorer(poison=["17.2"])
    with RewardSources(settings(32), proxy=proxy, gold=None) as sources:
        scores = one_step(sources, 32)
    assert failed_places(scores.source_scores["proxy"]) == {"17.2"}
    assert same_numbers(scores.source_scores["proxy"], right(32), but={"17.2"})
    assert len(proxy.calls) <= 15 + 4
    assert proxy.num_scored <= 128 + 128 + 32 + 8 + 2


def test_a_gold_score_that_failed_leaves_the_reward_alone() -> None:
    with RewardSources(settings(4), proxy=NumberScorer(), gold=NumberScorer(poison=["1.1"])) as sources:
        scores = one_step(sources, 4, with_gold=True)
    assert scores.gold is not None
    assert failed_places(scores.gold) == {"1.1"}
    assert scores.num_failed == {"proxy": 0, "gold": 1}
    assert not scores.rewards_PK.isnan().any()


def test_a_source_that_refuses_everything_ends_the_step_after_few_calls() -> None:
    """At most 25 of 128 completions may fail.

    Besides the calls for the 26 that fail alone there are 1 call for all, 1 for 32, 4 for 8 and 13 for 2.
    """
    proxy = DownScorer(ScoringError("HTTP 401: A valid key is needed"))
    with RewardSources(settings(32), proxy=proxy, gold=NumberScorer()) as sources:
        message = (
            r"proxy gave no score to 26 of the step's 128 completions; rloo.max_failed_score_fraction = 0.2 allows 25. "
            "The last reason: HTTP 401: A valid key"
        )
        with pytest.raises(RolloutError, match=message):
            one_step(sources, 32, with_gold=True)
    assert proxy.num_calls <= 26 + 1 + 1 + 4 + 13 + 6


def test_a_source_that_is_unavailable_is_not_asked_in_parts() -> None:
    gold = DownScorer(ScorerUnavailableError("19 attempts, the last one: ConnectError"))
    with (
        RewardSources(settings(32), proxy=NumberScorer(), gold=gold) as sources,
        pytest.raises(RolloutError, match="gold gave no score to .* ConnectError"),
    ):
        one_step(sources, 32, with_gold=True)
    assert gold.num_calls <= 3


def test_a_source_that_is_unavailable_for_one_call_costs_only_the_completions_of_that_call() -> None:
    proxy, first_is_asked, others_wait = NumberScorer(), threading.Event(), threading.Event()

    def away_at_first() -> None:
        if len(proxy.calls) == 1:
            first_is_asked.set()
            assert others_wait.wait(30)
            raise ScorerUnavailableError("full")

    proxy.before_reply = away_at_first
    with RewardSources(settings(8), proxy=proxy, gold=None) as sources:
        step = sources.begin(with_gold=False)
        sources.submit(step, 0, prompt(0), PromptRow())
        assert first_is_asked.wait(30)
        for index in range(1, 8):
            sources.submit(step, index, prompt(index), PromptRow())
        others_wait.set()
        scores = sources.collect(step, 8)
    assert failed_places(scores.rewards_PK.tolist()) == {f"0.{k}" for k in range(K)}


def test_failures_of_several_sources_that_together_are_too_many_end_the_step() -> None:
    """At most 5 of 20 completions may fail; one fails with the proxy and five others with the rule."""
    rule = RewardSourceConfig(name="rule", function=f"{RULES}:picky")
    with (
        RewardSources(
            settings(5, reward_sources=(rule,), max_failed_score_fraction=0.25),
            proxy=NumberScorer(nan=["3.3"]),
            gold=None,
        ) as sources,
        pytest.raises(
            RolloutError,
            match=r"proxy and rule gave no score to 6 of the step's 20 completions; .* = 0.25 allows 5\."
            r".*the score is nan",
        ),
    ):
        one_step(sources, 5)


def test_as_many_as_are_allowed_may_fail() -> None:
    with RewardSources(
        settings(5, max_failed_score_fraction=0.3),
        proxy=NumberScorer(nan=[f"{p}.0" for p in range(5)] + ["1.1"]),
        gold=None,
    ) as sources:
        assert one_step(sources, 5).num_failed == {"proxy": 6}


def test_an_error_other_than_a_failed_score_is_raised_by_collect() -> None:
    with (
        RewardSources(settings(2), proxy=DownScorer(KeyError("a bug")), gold=None) as sources,
        pytest.raises(KeyError, match="a bug"),
    ):
        one_step(sources, 2)


def test_a_source_that_exits_fails_the_step_and_does_not_end_the_run_as_a_success() -> None:
    with (
        RewardSources(settings(2), proxy=DownScorer(SystemExit(0)), gold=None) as sources,
        pytest.raises(RolloutError, match="proxy ended with SystemExit: 0"),
    ):
        one_step(sources, 2)


# A step that is abandoned


def test_a_step_that_was_abandoned_is_forgotten_and_its_late_answers_are_ignored() -> None:
    proxy, is_out, may_reply = NumberScorer(), threading.Event(), threading.Event()

    def hold_first() -> None:
        if len(proxy.calls) == 1:
            is_out.set()
            assert may_reply.wait(30)

    proxy.before_reply = hold_first
    with RewardSources(settings(2), proxy=proxy, gold=None) as sources:
        step = sources.begin(with_gold=False)
        stale = ScoreInput(prompt="old", completions=["-1", "-1", "-1", "-1"])
        sources.submit(step, 0, stale, PromptRow())
        assert is_out.wait(30)
        sources.submit(step, 1, stale, PromptRow())
        sources.abandon(step)
        step = sources.begin(with_gold=False)
        for index in (1, 0):
            sources.submit(step, index, prompt(index), PromptRow())
        may_reply.set()
        assert sources.collect(step, 2).source_scores["proxy"] == right(2)
    assert [len(call) for call in proxy.calls] == [1, 2], "the waiting prompt of the abandoned step is not asked about"


def test_failures_of_an_abandoned_step_do_not_count_in_the_next_and_a_failed_step_can_be_redone() -> None:
    proxy = NumberScorer(poison=["0.0", "0.1"])
    with RewardSources(settings(2, max_failed_score_fraction=0.0), proxy=proxy, gold=None) as sources:
        with pytest.raises(RolloutError, match="proxy gave no score to 1 of the step's 8"):
            one_step(sources, 2)
        proxy.poison.clear()
        assert one_step(sources, 2).num_failed == {"proxy": 0}


def test_one_step_follows_the_other_with_the_same_indices() -> None:
    with RewardSources(settings(3), proxy=NumberScorer(), gold=None) as sources:
        for _ in range(5):
            assert one_step(sources, 3).source_scores["proxy"] == right(3)


def test_two_steps_under_way_at_once_each_have_their_own_scores() -> None:
    proxy = NumberScorer(nan=["1.2"])
    with RewardSources(settings(4), proxy=proxy, gold=NumberScorer()) as sources:
        early, late = sources.begin(with_gold=False), sources.begin(with_gold=True)
        for index in range(4):
            item = ScoreInput(prompt="late", completions=[f"{10 + index}.{k}" for k in range(K)])
            sources.submit(late, index, item, PromptRow())
            sources.submit(early, 3 - index, prompt(3 - index), PromptRow())
        scores = sources.collect(early, 4)
        assert (scores.gold, failed_places(scores.source_scores["proxy"])) == (None, {"1.2"})
        assert same_numbers(scores.source_scores["proxy"], right(4), but={"1.2"})
        assert sources.collect(late, 4).gold == [[float(f"{10 + index}.{k}") for k in range(K)] for index in range(4)]


def test_closing_ends_the_threads_and_does_not_wait_for_a_call_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rm_robust.rloo.reward_sources.CLOSED_WITHIN_S", 0.1)
    proxy, is_out, may_reply = NumberScorer(), threading.Event(), threading.Event()

    def hang() -> None:
        is_out.set()
        may_reply.wait(30)

    proxy.before_reply = hang
    before = set(threading.enumerate())
    with RewardSources(settings(1), proxy=proxy, gold=NumberScorer()) as sources:
        step = sources.begin(with_gold=False)
        sources.submit(step, 0, prompt(0), PromptRow())
        assert is_out.wait(30)
        started_s = time.monotonic()
    assert time.monotonic() - started_s < 5
    may_reply.set()
    for thread in set(threading.enumerate()) - before:
        thread.join(5)
        assert not thread.is_alive()


# Abstentions


def abstains_of_prompt_1(messages: list[dict[str, str]], completion: str) -> float | None:
    return None if completion.startswith("1.") else 10.0


def abstains_of_0_0(messages: list[dict[str, str]], completion: str) -> float | None:
    return None if completion == "0.0" else 10.0


def abstains_always(messages: list[dict[str, str]], completion: str) -> None:
    return None


def test_a_source_that_abstains_is_left_out_of_the_sum_and_of_its_own_mean_and_is_no_failure(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Prompt 1 gets 2 * proxy alone; the others get 2 * proxy + 0.5 * 10."""
    chosen = settings(3, proxy_weight=2.0, reward_sources=(function_source("abstains_of_prompt_1", weight=0.5),))
    with RewardSources(chosen, proxy=NumberScorer(), gold=None) as sources:
        scores = one_step(sources, 3)
    expected = [[2 * score + (0.0 if p == 1 else 5.0) for score in row] for p, row in enumerate(right(3))]
    assert torch.equal(scores.rewards_PK, torch.tensor(expected, dtype=torch.float64).float())
    assert (scores.num_failed, scores.num_abstained) == (
        {"proxy": 0, "abstains_of_prompt_1": 0},
        {"abstains_of_prompt_1": 4},
    )
    metrics = score_metrics(scores)
    assert metrics["rloo/reward/abstains_of_prompt_1_mean"] == 10.0
    assert metrics["rloo/reward/abstains_of_prompt_1_num_abstained"] == 4
    assert (metrics["rloo/num_failed_scores"], metrics["rloo/failed_score_fraction"]) == (0, 0)
    assert not [record for record in caplog.records if "counts like 0" in record.getMessage()]


def test_a_source_that_abstains_from_a_part_of_a_prompt_is_warned_of_once(caplog: pytest.LogCaptureFixture) -> None:
    with RewardSources(
        settings(2, reward_sources=(function_source("abstains_of_0_0"),)), proxy=NumberScorer(), gold=None
    ) as sources:
        for _ in range(2):
            assert one_step(sources, 2).rewards_PK[0].tolist() == pytest.approx([0.0, 10.1, 10.2, 10.3])
    assert [
        record.getMessage().startswith("abstains_of_0_0 abstained from some completions of 1 prompts")
        for record in caplog.records
    ] == [True]


def test_a_completion_from_which_every_source_abstains_has_no_reward_and_counts_as_one_without() -> None:
    one = settings(4, proxy_weight=0.0, reward_sources=(function_source("abstains_of_prompt_1"),))
    quarter = one.model_copy(update={"max_failed_score_fraction": 0.25})
    with RewardSources(quarter, proxy=NumberScorer(), gold=None) as sources:
        scores = one_step(sources, 4)
    assert failed_places(scores.rewards_PK.tolist()) == {f"1.{k}" for k in range(K)}
    assert score_metrics(scores)["rloo/failed_score_fraction"] == 0.25
    with (
        RewardSources(one, proxy=NumberScorer(), gold=None) as sources,
        pytest.raises(RolloutError, match=r"abstains_of_prompt_1 gave no score to 4 .*_1 abstained"),
    ):
        one_step(sources, 4)


def test_a_source_that_abstains_from_a_whole_step_has_no_mean() -> None:
    with RewardSources(
        settings(2, reward_sources=(function_source("abstains_always"),)), proxy=NumberScorer(), gold=None
    ) as sources:
        scores = one_step(sources, 2)
    metrics = score_metrics(scores)
    assert metrics["rloo/reward/abstains_always_num_abstained"] == 2 * K
    assert "rloo/reward/abstains_always_mean" not in metrics
    assert scores.rewards_PK.tolist() == torch.tensor(right(2)).tolist()


def hangs_for_ever(messages: list[dict[str, str]], completion: str) -> float:
    threading.Event().wait(60)
    return 0.0


def test_a_function_that_hangs_ends_the_step_instead_of_stopping_the_run() -> None:
    rule = RewardSourceConfig(name="rule", function=f"{RULES}:hangs_for_ever", timeout_s=0.05)
    started_s = time.monotonic()
    with (
        RewardSources(settings(2, reward_sources=(rule,)), proxy=NumberScorer(), gold=None) as sources,
        pytest.raises(RolloutError, match=r"rule gave no score to .* did not answer within timeout_s = 0\.05"),
    ):
        one_step(sources, 2)
    assert time.monotonic() - started_s < 20


def test_a_columns_value_and_the_steps_number_reach_a_function() -> None:
    with RewardSources(
        settings(1, reward_sources=(function_source("with_answer"),)), proxy=NumberScorer(), gold=None
    ) as sources:
        step = sources.begin(with_gold=False)
        sources.submit(step, 0, prompt(0), PromptRow("p0", 3, {"answer": "0.2"}, [[1]] * K))
        assert sources.collect(step, 1).source_scores["with_answer"] == [[0.0, 0.0, 1.0, 0.0]]
        with pytest.raises(ConfigError, match="with_answer' needs"):
            sources.check_columns({"prompt"})


def with_answer(messages: list[dict[str, str]], completion: str, answer: str) -> int:
    return int(completion == answer)


# Checkpoints


def test_a_checkpoint_change_is_counted_every_time_and_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    proxy, changes = NumberScorer(), []
    with RewardSources(settings(1), proxy=proxy, gold=None) as sources:
        for checkpoint in ("sha256:a", "sha256:b", "sha256:b", "sha256:a"):
            proxy.checkpoint = checkpoint
            scores = one_step(sources, 1)
            assert scores.checkpoints == {"proxy": checkpoint}
            changes.append(scores.num_checkpoint_changes)
    assert changes == [0, 1, 0, 1]
    assert [record.levelno for record in caplog.records if "now scores with" in record.message] == [logging.WARNING]


# Functions and URLs


def test_a_function_that_raises_or_returns_no_finite_number_loses_that_completion_alone() -> None:
    rule = RewardSourceConfig(name="rule", function=f"{RULES}:picky")
    with RewardSources(
        settings(5, reward_sources=(rule,), max_failed_score_fraction=0.5), proxy=NumberScorer(), gold=None
    ) as sources:
        scores = one_step(sources, 5)
    assert (
        failed_places(scores.source_scores["rule"])
        == {"0.1", "1.0", "1.1", "2.2", "2.3"}
        == failed_places(scores.rewards_PK.tolist())
    )
    assert scores.source_scores["rule"][3] == [1.0] * K
    assert scores.num_failed == {"proxy": 0, "rule": 5}
    assert scores.checkpoints.keys() == {"proxy"}


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("nowhere.at_all:f", r"'nowhere.at_all:f' cannot be imported \(ModuleNotFoundError"),
        (f"{RULES}:absent", r"cannot be imported \(AttributeError"),
        ("no_colon", "cannot be imported"),
        (":f", "cannot be imported"),
        ("broken_rule:f", r"'broken_rule:f' cannot be imported \(SyntaxError"),
        (f"{RULES}:NOT_A_FUNCTION", "is 3, which cannot be called"),
    ],
)
def test_a_function_that_is_not_there_is_refused_before_anything_runs(
    function: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken_rule.py").write_text("def f(:")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ConfigError, match=message):
        RewardSources(
            settings(1, reward_sources=(RewardSourceConfig(name="rule", function=function),)),
            proxy=NumberScorer(),
            gold=None,
        )
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("scores of")]


@contextmanager
def url_source(
    answer: Callable[[int, list[dict[str, Any]]], Answer], num_prompts: int
) -> Iterator[tuple[RewardSources, Any]]:
    with serving(answer) as server:
        chosen = settings(
            num_prompts, proxy_weight=0.0, reward_sources=(RewardSourceConfig(name="elsewhere", url=server.url),)
        )
        with RewardSources(chosen, proxy=NumberScorer(), gold=None) as sources:
            yield sources, server


def test_a_url_source_is_asked_over_http() -> None:
    with url_source(lambda _, inputs: scored([[float(c) * 2 for c in item["completions"]] for item in inputs]), 16) as (
        sources,
        server,
    ):
        scores = one_step(sources, 16)
        assert server.num_requests <= 4
    assert scores.source_scores["elsewhere"] == [[2 * score for score in row] for row in right(16)]
    assert scores.checkpoints["elsewhere"] == "sha256:aaaa"


def test_a_nan_in_a_reply_over_http_costs_that_completion_alone() -> None:
    def answer(_: int, inputs: list[dict[str, Any]]) -> Answer:
        return scored([[NAN if c == "3.1" else float(c) for c in item["completions"]] for item in inputs])

    with url_source(answer, 16) as (sources, _):
        scores = one_step(sources, 16)
    assert failed_places(scores.rewards_PK.tolist()) == {"3.1"}


def test_a_service_that_answers_429_at_first_costs_no_score(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rm_robust.scoring.client.FIRST_BACKOFF_S", 0.001)

    def answer(number: int, inputs: list[dict[str, Any]]) -> Answer:
        return Answer(429) if number < 5 else scored([[float(c) for c in item["completions"]] for item in inputs])

    with url_source(answer, 4) as (sources, _):
        assert one_step(sources, 4).num_failed == {"proxy": 0, "elsewhere": 0}
