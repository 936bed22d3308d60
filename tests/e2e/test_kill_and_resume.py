"""SIGKILL in the middle of a stage, then the same command again: it goes on from the last committed state, and ends where no kill would have ended."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rm_robust.training_state import committed_steps
from tests.e2e.conftest import Launcher, SmokeRun
from tests.e2e.pipeline_process import RUN_DEADLINE_S, SMOKE_CONFIG

pytestmark = pytest.mark.timeout(2 * RUN_DEADLINE_S)

CHECKPOINT_EVERY_STEPS = {"sft": 4, "rloo": 2}
"""As in smoke.toml."""
NOT_REPEATABLE = ("time", "time/", "throughput/")


def lines_of(run_dir: Path, stage: str) -> list[dict[str, float]]:
    """Complete lines only: a kill may tear the last."""
    texts = (run_dir / "metrics.jsonl").read_text().split("\n")[:-1]
    return [line for line in map(json.loads, texts) if line["stage"] == stage]


def is_close(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=1e-3, abs_tol=1e-4)


def check_resumed(run_dir: Path, stage: str, before: list[dict[str, float]], committed: int, *, num_steps: int) -> None:
    """Lines up to the committed step are those written before the kill; later ones were written again, at most an interval of them."""
    after = lines_of(run_dir, stage)
    assert [line["step"] for line in after] == list(range(1, num_steps + 1))
    assert 0 < committed < num_steps, f"{stage} was killed too late or too early to test a resume: {committed} of {num_steps} steps were committed"
    assert after[:committed] == before[:committed]
    assert all(line["time"] > before[-1]["time"] for line in after[committed:])
    assert len(before) - committed <= CHECKPOINT_EVERY_STEPS[stage]


def test_a_run_killed_in_sft_and_in_rloo_ends_as_one_never_killed(smoke_run: SmokeRun, launcher: Launcher, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    arguments = ("full_rlhf.py", "--config", SMOKE_CONFIG, "--run-dir", str(run_dir))
    before: dict[str, list[dict[str, float]]] = {}
    committed: dict[str, int] = {}
    for stage in ("sft", "rloo"):
        running = launcher.pipeline(*arguments)
        running.wait_for_file(run_dir / stage / "state", "step-*", RUN_DEADLINE_S)
        running.kill()
        before[stage] = lines_of(run_dir, stage)
        committed[stage] = committed_steps(run_dir / stage / "state")[-1]
        assert not (run_dir / "stages" / f"{stage}.json").exists(), f"{stage} had ended before the kill"
    last = launcher.pipeline(*arguments)
    assert last.wait() == 0, last.output()[-4000:]

    for stage in ("sft", "rloo"):
        check_resumed(run_dir, stage, before[stage], committed[stage], num_steps=len(lines_of(smoke_run.run_dir, stage)))
    policy = load_file(run_dir / "checkpoints" / "policy" / "model.safetensors")
    assert all(torch.isfinite(tensor).all() for tensor in policy.values())
    for stage in ("sft", "reward_model", "rloo"):
        for own, uninterrupted in zip(lines_of(run_dir, stage), lines_of(smoke_run.run_dir, stage), strict=True):
            assert own.keys() == uninterrupted.keys()
            repeatable = [key for key in own if key != "stage" and not key.startswith(NOT_REPEATABLE)]
            different = {key: (own[key], uninterrupted[key]) for key in repeatable if not is_close(own[key], uninterrupted[key])}
            assert not different, f"{stage} step {own['step']}: with the kills, without"
