"""Where everything of a run lies, and which stages are done. The one place that knows the run directory's names."""

import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rm_robust.config.run import PipelineConfig
from rm_robust.errors import DataError
from rm_robust.runs.storage.commits import storage_errors, write_json_atomic
from rm_robust.runs.storage.copies import uri_of
from rm_robust.runs.storage.transfer import pull, pull_anew, put_file, put_folder

STAGES = ("world", "sft", "preferences", "reward_model", "evaluation", "rloo")
"""In the order in which they run."""
FILES = {
    "world": ["world"],
    "sft": ["checkpoints/sft"],
    "preferences": ["preferences", "rloo/prompts"],
    "reward_model": ["checkpoints/reward_model"],
    "evaluation": ["evaluation", "evaluation.json"],
}
"""What later stages and the report read of each stage's work."""


@dataclass(frozen=True)
class RunLayout:
    """Paths below a run directory."""

    run_dir: Path

    @property
    def world(self) -> Path:
        return self.run_dir / "world"

    @property
    def base_model(self) -> Path:
        return self.run_dir / "sft" / "base"

    @property
    def sft_tokens(self) -> Path:
        return self.run_dir / "sft" / "tokens"

    @property
    def sft_state(self) -> Path:
        return self.run_dir / "sft" / "state"

    @property
    def scenarios(self) -> Path:
        return self.run_dir / "preferences" / "scenarios"

    @property
    def preference_tokens(self) -> Path:
        return self.run_dir / "preferences" / "tokens"

    @property
    def reward_model_state(self) -> Path:
        return self.run_dir / "reward_model" / "state"

    @property
    def rloo_prompts(self) -> Path:
        return self.run_dir / "rloo" / "prompts"

    @property
    def rloo_state(self) -> Path:
        return self.run_dir / "rloo" / "state"

    @property
    def rloo_samples(self) -> Path:
        return self.run_dir / "rloo" / "samples.jsonl"

    @property
    def sft_checkpoint(self) -> Path:
        return self.run_dir / "checkpoints" / "sft"

    @property
    def reward_model_checkpoint(self) -> Path:
        return self.run_dir / "checkpoints" / "reward_model"

    @property
    def policy_checkpoint(self) -> Path:
        return self.run_dir / "checkpoints" / "policy"

    @property
    def best_policy_checkpoint(self) -> Path:
        """The evaluated policy with the highest gold mean."""
        return self.run_dir / "checkpoints" / "policy_best_gold"

    @property
    def rloo_baseline(self) -> Path:
        """Gold scores and lengths of the SFT policy's answers to the held prompts."""
        return self.run_dir / "rloo" / "baseline.json"

    @property
    def evaluation_scores(self) -> Path:
        return self.run_dir / "evaluation" / "scores.parquet"

    @property
    def evaluation_table(self) -> Path:
        return self.run_dir / "evaluation.json"

    @property
    def bt_twin(self) -> Path:
        """A run directory of its own: the reward model's Bradley-Terry twin and its evaluation."""
        return self.run_dir / "bt_twin"

    @property
    def summary(self) -> Path:
        return self.run_dir / "summary.json"

    def base_model_dir(self, config: PipelineConfig) -> str:
        """What SFT starts from: the user's model, or the one made from scratch."""
        return config.model.path or str(self.base_model)

    def sft_model_dir(self, config: PipelineConfig) -> str:
        """The policy before RLOO: the SFT stage's output, or the user's model when that stage is off."""
        if config.sft.enabled:
            return str(self.sft_checkpoint)
        assert config.model.path is not None
        return config.model.path

    def is_done(self, stage: str) -> bool:
        return (self.run_dir / "stages" / f"{stage}.json").exists()

    def run_stage(self, stage: str, work: Callable[[], dict[str, Any]]) -> bool:
        """Do `work` unless this run has committed the stage before; its result (plain JSON) is recorded with the seconds it took.

        Raises StorageError when the record cannot be written; the stage is then not done.
        """
        if self.is_done(stage):
            return False
        started = time.time()
        result = work()
        pull(self.run_dir)  # what other nodes have committed
        record = self.run_dir / "stages" / f"{stage}.json"
        with storage_errors(record):
            record.parent.mkdir(exist_ok=True)
        write_json_atomic(
            record, {"stage": stage, "seconds": time.time() - started, "finished_at": time.time(), **result}
        )
        return True

    def stage_result(self, stage: str) -> dict[str, Any]:
        """What a finished stage recorded. Raises DataError when it has not run."""
        path = self.run_dir / "stages" / f"{stage}.json"
        if not path.exists():
            raise DataError(
                f"Stage {stage!r} has not run in {self.run_dir}; run it first (pipelines/full_rlhf.py runs all in order)."
            )
        result: dict[str, Any] = json.loads(path.read_text())
        return result


def share_stages(source: Path, run_dir: Path, stages: list[str]) -> None:
    """`run_dir` becomes a run that has done these stages, as `source` did them; one that exists already is left alone."""
    if uri_of(run_dir) is not None:
        pull_anew(run_dir)
        if (run_dir / "stages" / f"{stages[-1]}.json").exists():
            return
        shutil.rmtree(run_dir, ignore_errors=True)  # it was put in part
    if run_dir.exists():
        return
    staging = run_dir.with_name(f".{run_dir.name}.partial")
    shutil.rmtree(staging, ignore_errors=True)
    for name in [name for stage in stages for name in (f"stages/{stage}.json", *FILES[stage])]:
        path, target = source / name, staging / name
        if not path.exists():  # a stage that the run's config leaves out
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            shutil.copytree(path, target, copy_function=_link)
        else:
            _link(path, target)
    lines = (source / "metrics.jsonl").read_text().splitlines()
    (staging / "metrics.jsonl").write_text(
        "".join(line + "\n" for line in lines if json.loads(line)["stage"] in stages)
    )
    staging.rename(run_dir)
    if uri_of(run_dir) is not None:
        put_stages(run_dir, stages)


def put_stages(run_dir: Path, stages: list[str]) -> None:
    """A stage's record last: it says that the rest is there."""
    for stage in stages:
        for path in [run_dir / name for name in FILES[stage]]:
            if path.is_dir():
                with put_folder(path, path):
                    pass  # the copy is that already
            elif path.exists():
                put_file(path)
    put_file(run_dir / "metrics.jsonl")
    for stage in stages:
        if (run_dir / "stages" / f"{stage}.json").exists():  # else it is one that the config leaves out
            put_file(run_dir / "stages" / f"{stage}.json")


def _link(source: Path | str, target: Path | str) -> None:
    """Files of a committed stage are replaced, never changed, so two runs may have them in common; a copy where the file system knows no links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
