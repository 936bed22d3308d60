"""Supervised fine-tuning on one worker, in this process: the loss by formula, and a run that is killed and resumed."""

import shutil
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from rm_robust.config.run import PipelineConfig
from rm_robust.config.shared import OptimizerConfig
from rm_robust.data.chat import ChatFormat
from rm_robust.data.rows import RowKind
from rm_robust.models.checkpoint import verify_checkpoint
from rm_robust.models.packing import Layout, group_length
from rm_robust.models.policy import PackedPolicy, load_policy
from rm_robust.runs.layout import RunLayout
from rm_robust.runs.metrics import read_metrics
from rm_robust.training.engines.ddp import DdpEngine
from rm_robust.training.sft import sft_step, train_sft
from tests.support.tiny_models import random_group, save_tiny_language_model, write_token_groups

GROUPS = [random_group(Random(seed), num_completions=1) for seed in range(6)]
NUM_ROWS = 12


@pytest.fixture(scope="module")
def base_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_language_model(tmp_path_factory.mktemp("models") / "base")


@pytest.mark.parametrize("max_tokens", [10_000, 1])
def test_the_loss_is_the_mean_over_completion_tokens_and_its_gradient_that_of_plain_transformers(
    base_dir: Path, max_tokens: int
) -> None:
    plain = AutoModelForCausalLM.from_pretrained(base_dir)
    losses = []
    for group in GROUPS:
        prompt, completion = group.prompt_ids, group.completion_ids[0]
        logits_TV = plain(input_ids=torch.tensor([prompt + completion])).logits[0]
        losses.append(
            torch.nn.functional.cross_entropy(
                logits_TV[len(prompt) - 1 : -1], torch.tensor(completion), reduction="none"
            )
        )
    loss = torch.cat(losses).mean()
    loss.backward()
    model = load_policy(base_dir, dtype=torch.float32)
    policy = PackedPolicy(model, Layout.SEGMENTS, temperature=1.0)
    engine = DdpEngine(policy, optimizer=OptimizerConfig(), device=torch.device("cpu"))
    metrics = sft_step(engine, GROUPS, policy=policy, pad_id=0, max_tokens=max_tokens, device=torch.device("cpu"))
    assert metrics["sft/loss"] == pytest.approx(loss.item(), abs=1e-5)
    assert metrics["sft/num_tokens"] == sum(group_length(group) for group in GROUPS)
    for (name, expected), (_, actual) in zip(plain.named_parameters(), model.named_parameters(), strict=True):
        torch.testing.assert_close(
            actual.grad, expected.grad, atol=1e-6, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
        )


def config_of(base_dir: Path, *, num_epochs: float) -> PipelineConfig:
    optimizer = {"learning_rate": 3e-3, "schedule": "constant", "warmup_fraction": 0}
    sft: dict[str, Any] = {
        "batch_size": 4,
        "num_epochs": num_epochs,
        "checkpoint_every_steps": 2,
        "optimizer": optimizer,
    }
    return PipelineConfig.model_validate({"name": "test", "model": {"path": str(base_dir)}, "sft": sft})


def prepared(run_dir: Path, base_dir: Path) -> Path:
    rows: list[dict[str, object]] = [
        {"prompt": f"red {i}", "completion": "The answer is green."} for i in range(NUM_ROWS)
    ]
    write_token_groups(
        RunLayout(run_dir).sft_tokens / "scenario=sft", rows, kind=RowKind.DEMONSTRATION, chat=ChatFormat.load(base_dir)
    )
    return run_dir


def test_training_lowers_the_loss_and_commits_a_policy_that_plain_transformers_loads(
    base_dir: Path, tmp_path: Path
) -> None:
    run_dir = prepared(tmp_path, base_dir)
    assert train_sft(config_of(base_dir, num_epochs=6), run_dir) == {"num_steps": 18}
    losses = [float(line["sft/loss"]) for line in read_metrics(run_dir, "sft")]
    assert len(losses) == 18
    assert losses[-1] < losses[0] - 1
    target = RunLayout(run_dir).sft_checkpoint
    assert verify_checkpoint(target, "policy").template_sha256 == ChatFormat.load(target).template_sha256
    chat, model = ChatFormat.load(target), AutoModelForCausalLM.from_pretrained(target)
    prompt, completion = chat.prompt_ids("red 3"), chat.completion_ids("The answer is green.")
    logits_TV = model(input_ids=torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
    loss = torch.nn.functional.cross_entropy(logits_TV, torch.tensor(completion)).item()
    assert loss < losses[0] - 1


def test_a_run_that_is_killed_and_resumed_ends_with_the_same_weights_as_one_that_is_not(
    base_dir: Path, tmp_path: Path
) -> None:
    unbroken, killed = prepared(tmp_path / "unbroken", base_dir), prepared(tmp_path / "killed", base_dir)
    train_sft(config_of(base_dir, num_epochs=2), unbroken)
    train_sft(config_of(base_dir, num_epochs=1), killed)  # three of six steps; the schedule is constant
    shutil.rmtree(RunLayout(killed).sft_checkpoint)
    train_sft(config_of(base_dir, num_epochs=2), killed)
    assert [line["step"] for line in read_metrics(killed, "sft")] == [1, 2, 3, 4, 5, 6]
    for line, other in zip(read_metrics(killed, "sft"), read_metrics(unbroken, "sft"), strict=True):
        assert line["sft/loss"] == other["sft/loss"]
    hashes = {
        verify_checkpoint(RunLayout(run_dir).sft_checkpoint, "policy").content_sha256 for run_dir in (unbroken, killed)
    }
    assert len(hashes) == 1
