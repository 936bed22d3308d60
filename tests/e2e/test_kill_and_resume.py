"""SIGKILL in the middle of a stage: the same command goes on from the last committed state.

It ends with the result that it would have without the kill.
"""

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rm_robust.training.state import committed_steps
from tests.e2e.conftest import WITH_TWIN, Launcher, SmokeRun
from tests.e2e.pipeline_process import RUN_DEADLINE_S, SMOKE_CONFIG, STAGE_DEADLINE_S, Running, wait_until

pytestmark = pytest.mark.timeout(2 * RUN_DEADLINE_S)

CHECKPOINT_EVERY_STEPS = {"sft": 4, "rloo": 2}
"""The steps between two checkpoints in smoke.toml, by stage."""
NOT_REPEATABLE = ("time", "time/", "throughput/")


def lines_of(run_dir: Path, stage: str) -> list[dict[str, float]]:
    """Return the complete lines of the stage's metrics. A kill may have torn the last line."""
    texts = (run_dir / "metrics.jsonl").read_text().split("\n")[:-1]
    return [line for line in map(json.loads, texts) if line["stage"] == stage]


def is_close(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=1e-3, abs_tol=1e-4)


def check_resumed(run_dir: Path, stage: str, before: list[dict[str, float]], committed: int, *, num_steps: int) -> None:
    """Check that the lines up to the committed step are from before the kill, and later ones were written again.

    At most one checkpoint interval was written again.
    """
    after = lines_of(run_dir, stage)
    assert [line["step"] for line in after] == list(range(1, num_steps + 1))
    assert 0 < committed < num_steps, (
        f"{stage} was killed too late or too early to test a resume: {committed} of {num_steps} steps were committed"
    )
    assert after[:committed] == before[:committed]
    assert all(line["time"] > before[-1]["time"] for line in after[committed:])
    assert len(before) - committed <= CHECKPOINT_EVERY_STEPS[stage]


@dataclass(frozen=True)
class Killed:
    """A stage that is killed: its script, when to kill it, and a file that it leaves in a finished run."""

    script: str
    is_at_work: Callable[[Path, Running], bool]
    result: str


STAGES = {
    "sft": Killed(
        "train_sft.py", lambda run_dir, _: any(run_dir.glob("sft/state/step-*")), "checkpoints/sft/model.safetensors"
    ),
    "preferences": Killed(
        "prepare_preferences.py",
        lambda run_dir, _: any(run_dir.glob("preferences/.tokens.partial-*")),
        "preferences/tokens/report.json",
    ),
    "reward_model": Killed(
        "train_reward_model.py",
        lambda run_dir, _: any(run_dir.glob("reward_model/state/step-*")),
        "checkpoints/reward_model/model.safetensors",
    ),
    "evaluation": Killed(
        "evaluate_reward_model.py",
        lambda run_dir, _: "evaluate in_domain" in "".join(log.read_text() for log in run_dir.glob("logs/*.log")),
        "evaluation.json",
    ),
    "rloo": Killed(
        "train_policy.py",
        lambda run_dir, _: any(run_dir.glob("rloo/state/step-*")),
        "checkpoints/policy/model.safetensors",
    ),
}
"""The stages, in the order of a run."""
WRITTEN = {
    "sft": ("sft", "checkpoints/sft"),
    "preferences": ("preferences", "rloo/prompts"),
    "reward_model": ("reward_model", "checkpoints/reward_model"),
    "evaluation": ("evaluation", "evaluation.json"),
    "rloo": (
        "rloo/state",
        "rloo/samples.jsonl",
        "rloo/baseline.json",
        "checkpoints/policy",
        "checkpoints/policy_best_gold",
    ),
}
"""The paths below the run directory that each stage writes."""


def copy_as_before(stage: str, smoke_run: SmokeRun, run_dir: Path) -> None:
    """Copy the smoke run's directory to `run_dir`, as it was when `stage` began."""
    shutil.copytree(smoke_run.run_dir, run_dir, ignore=shutil.ignore_patterns("logs"))
    undone = list(STAGES)[list(STAGES).index(stage) :]
    for name in undone:
        for written in (f"stages/{name}.json", *WRITTEN[name]):
            path = run_dir / written
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    kept = [
        line for line in (run_dir / "metrics.jsonl").read_text().splitlines() if json.loads(line)["stage"] not in undone
    ]
    (run_dir / "metrics.jsonl").write_text("".join(line + "\n" for line in kept))


def kill_at_work(stage: str, arguments: tuple[str, ...], launcher: Launcher, run_dir: Path) -> None:
    running = launcher.pipeline(*arguments)

    def is_at_work() -> bool:
        assert running.process.poll() is None, f"{stage} had ended before the kill:\n{running.output()[-4000:]}"
        return STAGES[stage].is_at_work(run_dir, running)

    wait_until(is_at_work, STAGE_DEADLINE_S, running.output)
    running.kill()
    assert not (run_dir / "stages" / f"{stage}.json").exists(), (
        f"{stage} had ended before the kill:\n{running.output()[-4000:]}"
    )


@pytest.mark.parametrize("stage", CHECKPOINT_EVERY_STEPS)
def test_a_stage_killed_between_commits_goes_on_from_the_last_one_and_ends_as_if_never_killed(
    stage: str, smoke_run: SmokeRun, launcher: Launcher, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    copy_as_before(stage, smoke_run, run_dir)
    arguments = (STAGES[stage].script, "--config", SMOKE_CONFIG, "--run-dir", str(run_dir), WITH_TWIN)
    kill_at_work(stage, arguments, launcher, run_dir)
    before, committed = lines_of(run_dir, stage), committed_steps(run_dir / stage / "state")[-1]
    last = launcher.pipeline(*arguments)
    assert last.wait() == 0, last.output()[-4000:]

    uninterrupted = lines_of(smoke_run.run_dir, stage)
    check_resumed(run_dir, stage, before, committed, num_steps=len(uninterrupted))
    for own, other in zip(lines_of(run_dir, stage), uninterrupted, strict=True):
        assert own.keys() == other.keys()
        repeatable = [key for key in own if key != "stage" and not key.startswith(NOT_REPEATABLE)]
        different = {key: (own[key], other[key]) for key in repeatable if not is_close(own[key], other[key])}
        assert not different, f"{stage} step {own['step']}: with the kill, without"
    weights, others = (load_file(folder / STAGES[stage].result) for folder in (run_dir, smoke_run.run_dir))
    assert weights.keys() == others.keys()
    assert all(torch.allclose(weights[name], others[name], rtol=1e-3, atol=1e-4) for name in weights)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [stage for stage in STAGES if stage not in CHECKPOINT_EVERY_STEPS])
def test_a_stage_between_them_killed_at_work_gives_the_same_result(
    stage: str, smoke_run: SmokeRun, launcher: Launcher, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    copy_as_before(stage, smoke_run, run_dir)
    arguments = (STAGES[stage].script, "--config", SMOKE_CONFIG, "--run-dir", str(run_dir), WITH_TWIN)
    kill_at_work(stage, arguments, launcher, run_dir)
    again = launcher.pipeline(*arguments)
    assert again.wait() == 0, again.output()[-4000:]
    found, expected = ((folder / STAGES[stage].result).read_bytes() for folder in (run_dir, smoke_run.run_dir))
    assert found.replace(str(run_dir).encode(), str(smoke_run.run_dir).encode()) == expected
    assert [line["step"] for line in lines_of(run_dir, "reward_model")] == (
        [] if stage == "preferences" else [1, 2, 3, 4]
    )
