"""RLOO with killed actors, failing scorers and stale samples: each run does its steps and trains on nothing wrong."""

import os
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from safetensors.torch import load_file

from rm_robust.config.run import PipelineConfig
from rm_robust.errors import RolloutError, ScoringError
from rm_robust.models.checkpoint import read_manifest
from rm_robust.rloo.controller import run_rloo
from rm_robust.runs.layout import RunLayout
from rm_robust.runs.metrics import MetricsLine, read_metrics
from rm_robust.scoring.contract import ScoreInput
from tests.support.local_serve import local_ray
from tests.support.rloo_run import Killer, LengthScorer, actor_processes, rloo_config, rloo_run_dir, wait_for


@pytest.fixture(scope="module", autouse=True)
def ray_session() -> Iterator[None]:
    with local_ray(num_cpus=2, OMP_WAIT_POLICY="PASSIVE"):
        yield


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def uninterrupted(models: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    config = rloo_config(models)
    run_dir = rloo_run_dir(config, tmp_path_factory.mktemp("uninterrupted"))
    result = run_rloo(config, run_dir, proxy=LengthScorer(), gold=LengthScorer())
    assert result == {
        **{"num_steps": 4, "resumed_from_step": 0, "engines_replaced": 0, "trainers_restarted": 0},
        **{"prompts_redone": 0, "steps_redone": 0},
    }
    require_nothing_left()
    require_evaluated(run_dir)
    return policy_weights(run_dir)


def require_evaluated(run_dir: Path) -> None:
    """Assert that every second step is evaluated and that the best of them is kept."""
    gold = {line["step"]: line["rloo/eval/gold_mean"] for line in steps_of(run_dir) if "rloo/eval/gold_mean" in line}
    assert list(gold) == [2, 4]
    best = read_manifest(RunLayout(run_dir).best_policy_checkpoint).training["num_steps"]
    assert gold[best] == max(gold.values())


def policy_weights(run_dir: Path) -> dict[str, torch.Tensor]:
    return load_file(RunLayout(run_dir).policy_checkpoint / "model.safetensors")


def steps_of(run_dir: Path) -> list[MetricsLine]:
    return read_metrics(run_dir, "rloo")


def require_same(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


def require_nothing_left() -> None:
    """Assert that no actor process and no placement group is left, after waiting for Ray to end killed processes."""
    wait_for(
        lambda: not actor_processes("RolloutEngine") and not actor_processes("PolicyTrainer"),
        what="the end of all actors",
    )
    assert not [group for group in ray.util.placement_group_table().values() if group["state"] != "REMOVED"]


def num_steps_done(run_dir: Path) -> int:
    return len(steps_of(run_dir))


@pytest.mark.parametrize("num_engines", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_an_engine_killed_while_it_samples_changes_nothing(
    uninterrupted: dict[str, torch.Tensor], models: Path, tmp_path: Path, num_engines: int
) -> None:
    """The engine's prompts are sampled again by the same policy version with the same seeds."""
    config = rloo_config(models, num_engines=num_engines)
    run_dir = rloo_run_dir(config, tmp_path)
    killer = Killer("RolloutEngine", lambda: num_steps_done(run_dir) == 1)
    result = run_rloo(config, run_dir, proxy=LengthScorer(), gold=LengthScorer())
    assert killer.killed.is_set()
    assert (result["num_steps"], result["engines_replaced"]) == (4, 1)
    assert [line["rloo/policy_lag"] for line in steps_of(run_dir)] == [0] * 4
    require_same(policy_weights(run_dir), uninterrupted)
    require_nothing_left()


def test_steps_of_a_trainer_killed_between_commits_are_redone_from_the_last_commit(
    uninterrupted: dict[str, torch.Tensor], models: Path, tmp_path: Path
) -> None:
    config = rloo_config(models)
    run_dir = rloo_run_dir(config, tmp_path)
    killer = Killer("PolicyTrainer", lambda: num_steps_done(run_dir) == 3)
    result = run_rloo(config, run_dir, proxy=LengthScorer(), gold=LengthScorer())
    assert killer.killed.is_set()
    assert (result["num_steps"], result["trainers_restarted"]) == (4, 1)
    assert [line["step"] for line in steps_of(run_dir)] == [1, 2, 3, 4]
    require_same(policy_weights(run_dir), uninterrupted)
    require_nothing_left()


@pytest.mark.slow
def test_trainers_that_never_commit_a_step_end_the_run(models: Path, tmp_path: Path) -> None:
    config = rloo_config(models, max_restarts=0)
    run_dir = rloo_run_dir(config, tmp_path)
    Killer("PolicyTrainer", lambda: num_steps_done(run_dir) == 1)
    with pytest.raises(RolloutError, match="without a committed step between"):
        run_rloo(config, run_dir, proxy=LengthScorer(), gold=LengthScorer())
    require_nothing_left()


class FailsForSome(LengthScorer):
    """Refuses a share of the texts, chosen by their content.

    The whole request fails, as with a server that computes NaN for one of the texts.
    """

    def __init__(self, share: float) -> None:
        super().__init__(self._refuse)
        self.share = share
        self.failing: set[tuple[str, str]] = set()

    def _refuse(self, inputs: Sequence[ScoreInput]) -> None:
        refused = {
            (str(item.prompt), text)
            for item in inputs
            for text in item.completions
            if torch.tensor(list(text.encode())).sum() % 100 < 100 * self.share
        }
        self.failing |= refused
        if refused:
            raise ScoringError(f"{len(refused)} scores are not finite")


def test_scores_that_fail_are_counted_and_in_no_update(models: Path, tmp_path: Path) -> None:
    config = rloo_config(
        models, num_prompts_per_step=8, num_completions_per_prompt=4, num_steps=3, max_failed_score_fraction=0.5
    )
    run_dir = rloo_run_dir(config, tmp_path)
    proxy = FailsForSome(0.05)
    run_rloo(config, run_dir, proxy=proxy, gold=LengthScorer())
    steps = steps_of(run_dir)
    assert len(steps) == 3
    assert sum(int(line["rloo/num_failed_scores"]) for line in steps) == len(proxy.failing) > 0
    for line in steps:
        assert line["rloo/num_completions"] == 32
        assert line["rloo/without_gradient_fraction"] >= line["rloo/failed_score_fraction"]


def test_a_scorer_that_fails_for_all_ends_the_run_and_leaves_nothing(models: Path, tmp_path: Path) -> None:
    config = rloo_config(models)
    run_dir = rloo_run_dir(config, tmp_path)
    with pytest.raises(RolloutError, match="proxy"):
        run_rloo(config, run_dir, proxy=FailsForSome(1.0), gold=LengthScorer())
    require_nothing_left()


class InterruptsAfter(LengthScorer):
    """Presses Ctrl-C while the step after the first `num_steps` is scored."""

    def __init__(self, num_steps: int, run_dir: Path) -> None:
        super().__init__(self._interrupt)
        self.num_steps, self.run_dir, self.is_done = num_steps, run_dir, False

    def _interrupt(self, inputs: Sequence[ScoreInput]) -> None:
        if not self.is_done and num_steps_done(self.run_dir) == self.num_steps:
            self.is_done = True
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.slow
@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_leaves_nothing_and_the_run_resumes(
    uninterrupted: dict[str, torch.Tensor], models: Path, tmp_path: Path
) -> None:
    config = rloo_config(models)
    run_dir = rloo_run_dir(config, tmp_path)
    with pytest.raises(KeyboardInterrupt):
        run_rloo(config, run_dir, proxy=InterruptsAfter(3, run_dir), gold=LengthScorer())
    require_nothing_left()
    result = run_rloo(config, run_dir, proxy=LengthScorer(), gold=LengthScorer())
    assert (result["num_steps"], result["resumed_from_step"]) == (4, 2)
    require_same(policy_weights(run_dir), uninterrupted)


@pytest.mark.parametrize("lag", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_a_lagging_run_trains_each_step_on_the_version_that_the_lag_says(
    models: Path, tmp_path: Path, lag: int
) -> None:
    config = rloo_config(models, max_policy_lag=lag, num_steps=6)
    run_dir = rloo_run_dir(config, tmp_path)
    assert run_rloo(config, run_dir, proxy=LengthScorer(), gold=LengthScorer())["num_steps"] == 6
    steps = steps_of(run_dir)
    assert [line["rloo/policy_lag"] for line in steps] == [min(step, lag) for step in range(6)]
    assert steps[0]["rloo/sampler_kl_mean"] < 1e-8 < steps[-1]["rloo/sampler_kl_mean"]
    require_nothing_left()


@pytest.mark.slow
def test_an_engine_lost_in_a_lagging_run_is_replaced_and_no_sample_is_older_than_allowed(
    models: Path, tmp_path: Path
) -> None:
    config = rloo_config(models, max_policy_lag=2, num_steps=6, num_engines=2)
    run_dir = rloo_run_dir(config, tmp_path)
    killer = Killer("RolloutEngine", lambda: num_steps_done(run_dir) == 2)
    result = run_rloo(config, run_dir, proxy=LengthScorer(), gold=LengthScorer())
    assert killer.killed.is_set()
    assert (result["num_steps"], result["engines_replaced"]) == (6, 1)
    assert all(0 <= line["rloo/policy_lag"] <= 2 for line in steps_of(run_dir))


STRATEGIES: list[dict[str, Any]] = [{"kind": "fsdp2"}, {"kind": "deepspeed", "zero_stage": 3}]


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES, ids=lambda strategy: strategy["kind"])
def test_two_sharded_trainers_make_the_policy_that_one_makes(
    uninterrupted: dict[str, torch.Tensor], models: Path, tmp_path: Path, strategy: dict[str, Any]
) -> None:
    config: PipelineConfig = rloo_config(
        models, strategy=strategy, trainers={"num_workers": 2, "num_cpus_per_worker": 0.1}
    )
    run_dir = rloo_run_dir(config, tmp_path)
    run_rloo(config, run_dir, proxy=LengthScorer(), gold=LengthScorer())
    sharded = policy_weights(run_dir)
    for name, expected in uninterrupted.items():
        torch.testing.assert_close(sharded[name], expected, atol=1e-4, rtol=0)
