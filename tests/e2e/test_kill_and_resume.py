"""SIGKILL in the middle of a stage, then the same command again: it goes on from the last committed state, and ends where no kill would have ended."""

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rm_robust.training_state import committed_steps
from tests.e2e.conftest import Launcher, SmokeRun
from tests.e2e.pipeline_process import RUN_DEADLINE_S, SMOKE_CONFIG, STAGE_DEADLINE_S, Running, wait_until

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


@dataclass(frozen=True)
class LaterStage:
    """A stage between SFT and RLOO: its script, when to kill it, and a file that a finished run has from it."""

    script: str
    is_at_work: Callable[[Path, Running], bool]
    result: str


LATER_STAGES = {
    "preferences": LaterStage(
        "prepare_preferences.py", lambda run_dir, _: any(run_dir.glob("preferences/.tokens.partial-*")), "preferences/tokens/report.json"
    ),
    "reward_model": LaterStage(
        "train_reward_model.py", lambda run_dir, _: any(run_dir.glob("reward_model/state/step-*")), "checkpoints/reward_model/model.safetensors"
    ),
    "evaluation": LaterStage("evaluate_reward_model.py", lambda _, running: "evaluate in_domain" in running.output(), "evaluation.json"),
}


def copy_as_before(stage: str, smoke_run: SmokeRun, run_dir: Path) -> None:
    """The smoke run's directory as it was when `stage` began."""
    shutil.copytree(smoke_run.run_dir, run_dir)
    stages = list(LATER_STAGES)
    undone = [*stages[stages.index(stage) :], "rloo"]
    for name in undone:
        (run_dir / "stages" / f"{name}.json").unlink()
        shutil.rmtree(run_dir / name)
        shutil.rmtree(run_dir / "checkpoints" / name, ignore_errors=True)
    (run_dir / "evaluation.json").unlink()
    kept = [line for line in (run_dir / "metrics.jsonl").read_text().splitlines() if json.loads(line)["stage"] not in undone]
    (run_dir / "metrics.jsonl").write_text("".join(line + "\n" for line in kept))


@pytest.mark.slow
@pytest.mark.parametrize("stage", LATER_STAGES)
def test_a_later_stage_killed_at_work_gives_the_same_result(stage: str, smoke_run: SmokeRun, launcher: Launcher, tmp_path: Path) -> None:
    plan, run_dir = LATER_STAGES[stage], tmp_path / "run"
    copy_as_before(stage, smoke_run, run_dir)
    arguments = (plan.script, "--config", SMOKE_CONFIG, "--run-dir", str(run_dir))
    running = launcher.pipeline(*arguments)
    wait_until(lambda: plan.is_at_work(run_dir, running), STAGE_DEADLINE_S, running.output)
    running.kill()
    assert not (run_dir / "stages" / f"{stage}.json").exists(), f"{stage} had ended before the kill"
    again = launcher.pipeline(*arguments)
    assert again.wait() == 0, again.output()[-4000:]
    assert (run_dir / plan.result).read_bytes() == (smoke_run.run_dir / plan.result).read_bytes()
    assert [line["step"] for line in lines_of(run_dir, "reward_model")] == ([] if stage == "preferences" else [1, 2, 3, 4])
