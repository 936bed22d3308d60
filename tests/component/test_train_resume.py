"""Reward-model training through Ray Train, with a worker killed at work.

The group starts again and ends as one that was never killed.
"""

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
import ray
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from rm_robust.cluster.workers import run_on_workers
from rm_robust.config.run import PipelineConfig
from rm_robust.data.chat import ChatFormat
from rm_robust.data.rows import RowKind
from rm_robust.runs.layout import RunLayout
from rm_robust.runs.metrics import read_metrics
from rm_robust.training.reward_model.training import train_reward_model
from rm_robust.training.state import committed_steps
from tests.support.tiny_models import save_tiny_language_model, write_token_groups

NUM_STEPS = 60
WORDS = ["red", "green", "blue", "river", "quiet"]
POLL_EVERY_S = 0.005
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module", autouse=True)
def _ray() -> Iterator[None]:
    ray.init(address="local", num_cpus=2, include_dashboard=False, logging_level="warning")
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def base_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_language_model(tmp_path_factory.mktemp("models") / "base")


def prepared(run_dir: Path, base_dir: Path) -> Path:
    rng, chat, tokens = Random(0), ChatFormat.load(base_dir), RunLayout(run_dir).preference_tokens

    def pair(_: int) -> dict[str, object]:
        return {
            "prompt": " ".join(rng.choices(WORDS, k=4)),
            "chosen": f"{rng.choice(WORDS)} apples",
            "rejected": f"{rng.choice(WORDS)} seven",
        }

    for name in ("train", "in_domain"):
        write_token_groups(tokens / f"scenario={name}", [pair(i) for i in range(40)], kind=RowKind.PAIR, chat=chat)
    return run_dir


def config_of(base_dir: Path, strategy: dict[str, Any], num_workers: int) -> PipelineConfig:
    settings: dict[str, Any] = {
        "base_path": str(base_dir),
        "batch_size": 8,
        "num_epochs": NUM_STEPS * 8 / 40,
        "strategy": strategy,
        "workers": {"num_workers": num_workers, "num_cpus_per_worker": 0.5},
        "evaluate_every_steps": 20,
        "checkpoint_every_steps": 7,
    }
    return PipelineConfig.model_validate(
        {"name": "test", "reward_model": settings, "data": {"max_prompt_tokens": 60, "max_completion_tokens": 40}}
    )


def run(config: PipelineConfig, run_dir: Path, *, kill: bool) -> None:
    died = run_dir / "died"

    def train(own: PipelineConfig, folder: Path) -> dict[str, float]:
        """Train on a worker. The function is nested, so that Ray sends it by value."""

        def die() -> None:
            while len(committed_steps(RunLayout(folder).reward_model_state)) == 0:
                time.sleep(POLL_EVERY_S)
            died.touch()
            os._exit(1)

        if kill and dist.get_rank() == dist.get_world_size() - 1 and not died.exists():
            threading.Thread(target=die, daemon=True).start()
        return train_reward_model(own, folder)

    run_on_workers(train, stage="reward_model", config=config, run_dir=run_dir, workers=config.reward_model.workers)
    assert died.exists() == kill


CASES = {
    "ddp, 1 worker": ({"kind": "ddp"}, 1),
    "fsdp2, 1 worker": ({"kind": "fsdp2"}, 1),
    "ZeRO-2, 1 worker": ({"kind": "deepspeed", "zero_stage": 2}, 1),
    "ddp, 2 workers": ({"kind": "ddp"}, 2),
    "fsdp2, 2 workers": ({"kind": "fsdp2"}, 2),
    "ZeRO-2, 2 workers": ({"kind": "deepspeed", "zero_stage": 2}, 2),
}


@pytest.mark.parametrize("name", CASES)
def test_a_killed_run_ends_as_one_never_killed(name: str, base_dir: Path, tmp_path: Path) -> None:
    strategy, num_workers = CASES[name]
    config = config_of(base_dir, strategy, num_workers)
    whole, killed = prepared(tmp_path / "whole", base_dir), prepared(tmp_path / "killed", base_dir)
    run(config, whole, kill=False)
    run(config, killed, kill=True)
    tolerance = 0.0 if num_workers == 1 else 1e-5
    expected, actual = read_metrics(whole, "reward_model"), read_metrics(killed, "reward_model")
    assert [line["step"] for line in actual] == list(range(1, NUM_STEPS + 1))
    assert [line["reward_model/loss"] for line in actual] == pytest.approx(
        [line["reward_model/loss"] for line in expected], abs=tolerance, rel=0
    )
    weights, trained = (load_file(RunLayout(d).reward_model_checkpoint / "model.safetensors") for d in (whole, killed))
    for key, tensor in weights.items():
        torch.testing.assert_close(
            trained[key], tensor, atol=tolerance, rtol=0, msg=lambda text, key=key: f"{key}: {text}"
        )
