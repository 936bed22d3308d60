"""Reward-model training and evaluation on one worker, in this process.

Training learns and resumes exactly, and evaluation scores what it trained.
"""

import json
import math
from pathlib import Path
from random import Random
from typing import Any

import pyarrow.parquet as pq
import pytest

from rm_robust.config.run import EvaluationConfig, PipelineConfig
from rm_robust.data.chat import ChatFormat
from rm_robust.data.records import TokenGroup
from rm_robust.data.rows import RowKind
from rm_robust.data.token_files import TokenisedGroup
from rm_robust.errors import DataError
from rm_robust.evaluation.scenarios import evaluate_scenarios, scenario_result
from rm_robust.models.checkpoint import verify_checkpoint
from rm_robust.runs.layout import RunLayout
from rm_robust.runs.metrics import read_metrics
from rm_robust.training.reward_model.training import train_reward_model
from rm_robust.training.state import committed_steps
from tests.support.tiny_models import save_tiny_language_model, write_token_groups

WORDS = ["red", "green", "blue", "river", "quiet"]


@pytest.fixture(scope="module")
def base_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_language_model(tmp_path_factory.mktemp("models") / "base")


def prepared(run_dir: Path, base_dir: Path) -> Path:
    """Write pairs that one token tells apart: chosen answers end in "apples", rejected ones in "seven"."""
    rng, chat, tokens = Random(0), ChatFormat.load(base_dir), RunLayout(run_dir).preference_tokens
    prompts = [" ".join(rng.choices(WORDS, k=4)) for _ in range(40)]
    pairs: list[dict[str, object]] = [
        {"prompt": p, "chosen": f"{rng.choice(WORDS)} apples", "rejected": f"{rng.choice(WORDS)} seven"}
        for p in prompts
    ]
    completions, gold_scores = ["red seven", "blue apples", "seven seven"], [1.0, 2.0, 0.0]
    ranked: list[dict[str, object]] = [
        {"prompt": p, "completions": completions, "gold_scores": gold_scores} for p in prompts[:5]
    ]
    for name, rows, kind in (
        ("train", pairs[:32], RowKind.PAIR),
        ("in_domain", pairs[32:], RowKind.PAIR),
        ("mutual_disjoint", ranked, RowKind.RANKED),
    ):
        write_token_groups(tokens / f"scenario={name}", rows, kind=kind, chat=chat)
    return run_dir


def config_of(base_dir: Path, *, num_epochs: float, objective: str = "bsr", **more: object) -> PipelineConfig:
    settings: dict[str, Any] = {
        "base_path": str(base_dir),
        "objective": objective,
        **({"bsr_coefficient": 0.1} if objective == "bsr" else {}),
        **more,
        "batch_size": 8,
        "num_epochs": num_epochs,
        "evaluate_every_steps": 4,
        "checkpoint_every_steps": 3,
        "optimizer": {"learning_rate": 3e-3, "schedule": "constant", "warmup_fraction": 0},
    }
    limits = {"max_prompt_tokens": 60, "max_completion_tokens": 40}
    return PipelineConfig.model_validate({"name": "test", "reward_model": settings, "data": limits})


@pytest.fixture(scope="module")
def trained(base_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = prepared(tmp_path_factory.mktemp("runs") / "trained", base_dir)
    assert train_reward_model(config_of(base_dir, num_epochs=3), run_dir) == {"num_steps": 12}
    return run_dir


def test_training_learns_to_tell_the_pairs_apart(trained: Path) -> None:
    lines = read_metrics(trained, "reward_model")
    assert len(lines) == 12
    assert float(lines[-1]["reward_model/loss"]) < float(lines[0]["reward_model/loss"])
    assert lines[-1]["reward_model/in_domain_accuracy"] == 1.0
    assert ["reward_model/in_domain_accuracy" in line for line in lines] == [step % 4 == 0 for step in range(1, 13)]


def test_every_step_logs_the_objectives_parts_and_the_heads_norm(trained: Path) -> None:
    for line in read_metrics(trained, "reward_model"):
        mean, term = float(line["reward_model/batch_mean_score"]), float(line["reward_model/penalty"])
        assert line["reward_model/effective_coefficient"] == pytest.approx(0.1 * 8)
        assert term == pytest.approx(0.8 * mean**2, rel=1e-4, abs=1e-9)
        assert float(line["reward_model/loss"]) == pytest.approx(float(line["reward_model/pair_loss"]) + term, abs=1e-5)
        # E ||W||^2 = H / (H + 1) at the start
        assert float(line["reward_model/head_norm"]) == pytest.approx(1, abs=0.5)


def test_the_best_evaluation_becomes_the_checkpoint_and_training_stops_early(base_dir: Path, tmp_path: Path) -> None:
    """The pairs are learned at once, so that no later evaluation is better than the first perfect one."""
    run_dir = prepared(tmp_path, base_dir)
    config = config_of(
        base_dir, num_epochs=10, best_metric="in_domain_accuracy", early_stopping_evaluations=2, num_kept_checkpoints=2
    )
    num_steps = train_reward_model(config, run_dir)["num_steps"]
    lines = read_metrics(run_dir, "reward_model")
    evaluations = {
        int(line["step"]): float(line["reward_model/in_domain_accuracy"])
        for line in lines
        if "reward_model/in_domain_accuracy" in line
    }
    best = min(step for step, value in evaluations.items() if value == max(evaluations.values()))
    assert (num_steps, len(lines)) == (best, best + 8)
    assert verify_checkpoint(RunLayout(run_dir).reward_model_checkpoint, "reward_model").training["num_steps"] == best
    kept = committed_steps(RunLayout(run_dir).reward_model_state)
    assert best in kept
    assert kept[-1] == best + 8
    assert len(kept) == 3
    expected = prepared(tmp_path / "short", base_dir)
    train_reward_model(config_of(base_dir, num_epochs=best * 8 / 32), expected)
    manifests = [verify_checkpoint(RunLayout(d).reward_model_checkpoint, "reward_model") for d in (run_dir, expected)]
    assert manifests[0].content_sha256 == manifests[1].content_sha256


def test_the_margin_column_is_needed_where_the_objective_reads_it(base_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="32 of 32 training pairs have none"):
        train_reward_model(config_of(base_dir, num_epochs=1, objective="margin"), prepared(tmp_path, base_dir))


def test_the_objective_is_the_configs(base_dir: Path, trained: Path, tmp_path: Path) -> None:
    run_dir = prepared(tmp_path, base_dir)
    train_reward_model(config_of(base_dir, num_epochs=0.25, objective="bt"), run_dir)
    (first,), bsr = read_metrics(run_dir, "reward_model"), read_metrics(trained, "reward_model")[0]
    assert (first["reward_model/penalty"], first["reward_model/effective_coefficient"]) == (0, 0)
    assert first["reward_model/pair_loss"] == bsr["reward_model/pair_loss"]
    assert float(first["reward_model/loss"]) < float(bsr["reward_model/loss"])


def test_a_run_that_is_killed_and_resumed_commits_the_same_checkpoint(
    base_dir: Path, trained: Path, tmp_path: Path
) -> None:
    run_dir = prepared(tmp_path, base_dir)
    train_reward_model(config_of(base_dir, num_epochs=1), run_dir)  # four of twelve steps; the schedule is constant
    train_reward_model(config_of(base_dir, num_epochs=3), run_dir)
    assert [line["step"] for line in read_metrics(run_dir, "reward_model")] == list(range(1, 13))
    manifests = [verify_checkpoint(RunLayout(d).reward_model_checkpoint, "reward_model") for d in (trained, run_dir)]
    assert manifests[0] == manifests[1]


def test_evaluation_writes_a_table_and_every_score_of_the_committed_checkpoint(base_dir: Path, trained: Path) -> None:
    table = evaluate_scenarios(config_of(base_dir, num_epochs=3), trained, device="cpu")
    layout = RunLayout(trained)
    assert json.loads(layout.evaluation_table.read_text()) == table
    assert list(table) == ["in_domain", "mutual_disjoint"]
    assert table["in_domain"] == {
        "metric": "accuracy",
        "value": 1.0,
        "num_prompts": 8,
        "num_undefined": 0,
        "num_constant_scores": 0,
    }
    assert (table["mutual_disjoint"]["metric"], table["mutual_disjoint"]["num_prompts"]) == ("kendall_tau_b", 5)
    rows = pq.read_table(layout.evaluation_scores).to_pylist()
    assert len(rows) == 8 * 2 + 5 * 3
    assert all(math.isfinite(row["score"]) and row["hidden_norm_before_final_norm"] > 0 for row in rows)
    pairs = [row["score"] for row in rows if row["scenario"] == "in_domain"]
    assert all(chosen > rejected for chosen, rejected in zip(pairs[::2], pairs[1::2], strict=True))


def test_evaluation_takes_the_first_prompts_where_a_limit_is_set(base_dir: Path, trained: Path) -> None:
    config = config_of(base_dir, num_epochs=3)
    limited = config.model_copy(update={"evaluation": EvaluationConfig(max_prompts_per_scenario=3)})
    assert evaluate_scenarios(limited, trained, device="cpu")["in_domain"]["num_prompts"] == 3


def test_evaluation_without_any_scenario_is_an_error(base_dir: Path, trained: Path, tmp_path: Path) -> None:
    (tmp_path / "checkpoints").symlink_to(trained / "checkpoints")
    with pytest.raises(DataError, match="holds none of in_domain"):
        evaluate_scenarios(config_of(base_dir, num_epochs=3), tmp_path, device="cpu")


def group(gold_scores: list[float]) -> TokenisedGroup:
    return TokenisedGroup("x", [], TokenGroup([3], [[4]] * len(gold_scores)), gold_scores, None)


def test_pairs_are_judged_by_accuracy_and_everything_else_by_tau() -> None:
    assert scenario_result([group([1.0, 0.0])] * 2, [[2.0, 1.0], [1.0, 2.0]]).metric == "accuracy"
    assert scenario_result([group([1.0, 0.0]), group([0.2, 0.9])], [[2.0, 1.0], [1.0, 2.0]]).metric == "kendall_tau_b"
