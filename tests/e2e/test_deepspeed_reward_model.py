"""The reward-model stage with DeepSpeed ZeRO on two workers, through the stages' own scripts."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from tests.e2e.conftest import Launcher
from tests.e2e.pipeline_process import RUN_DEADLINE_S, SMOKE_CONFIG

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2 * RUN_DEADLINE_S)]


def test_a_reward_model_trained_with_zero_2_loads_in_transformers(launcher: Launcher, tmp_path: Path) -> None:
    overrides = ["sft.num_epochs=0.2", "reward_model.strategy.kind=deepspeed", "reward_model.strategy.zero_stage=2"]
    arguments = [
        "--config",
        SMOKE_CONFIG,
        "--run-dir",
        str(tmp_path / "run"),
        *(word for override in overrides for word in ("--set", override)),
    ]
    for script in ("train_sft.py", "prepare_preferences.py", "train_reward_model.py"):
        running = launcher.pipeline(script, *arguments)
        assert running.wait() == 0, running.output()[-4000:]
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["stage"] == "reward_model"] == [1, 2, 3, 4]
    folder = tmp_path / "run" / "checkpoints" / "reward_model"
    model, loading = AutoModelForSequenceClassification.from_pretrained(folder, output_loading_info=True)
    assert not loading["missing_keys"]
    assert model.config.num_labels == 1
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
