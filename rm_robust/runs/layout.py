"""Names and places of everything in a run directory, and which stages are done."""

import json
import os
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rm_robust.config.run import PipelineConfig
from rm_robust.errors import DataError
from rm_robust.runs.metrics import METRICS_NAME, read_metrics
from rm_robust.runs.storage.commits import storage_errors, write_json_atomic
from rm_robust.runs.storage.copies import uri_of
from rm_robust.runs.storage.generations import sha256
from rm_robust.runs.storage.transfer import pull, pull_anew, put_file, put_folder

SHARED_NAME = ".shared_stages"
"""The file of a run directory that began with the stages of another run."""
HASHED_BYTES = 2**20
"""Largest file whose hash is in the record of its stage."""
HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


@dataclass(frozen=True)
class StageRecord:
    """What a stage leaves in a run directory. pipelines/stages.py says how each one runs."""

    name: str
    """The stage's name on the command line, in log lines, and of its file in stages/, which says that it is done."""
    files: tuple[str, ...]
    """Files and folders, below the run directory, that later stages and the report read."""
    has_steps: bool = False
    """Whether it writes metrics of its steps."""
    is_of_twin: bool = False
    """Whether the Bradley-Terry twin of the reward model runs it too, in a run directory of its own."""


STAGES = (
    StageRecord("world", ("world",)),
    StageRecord("sft", ("checkpoints/sft",), has_steps=True),
    StageRecord("preferences", ("preferences", "rloo/prompts", "models")),
    StageRecord("reward_model", ("checkpoints/reward_model",), has_steps=True, is_of_twin=True),
    StageRecord("evaluation", ("evaluation", "evaluation.json"), is_of_twin=True),
    StageRecord("rloo", ("checkpoints/policy",), has_steps=True),
)
"""The stages that a run records as done, in the order in which they run."""
FILES_OF = {stage.name: stage.files for stage in STAGES}
STAGES_WITH_STEPS = tuple(stage.name for stage in STAGES if stage.has_steps)
TWIN_STAGES = tuple(stage.name for stage in STAGES if stage.is_of_twin)


@dataclass(frozen=True)
class RunLayout:
    """Paths below a run directory."""

    run_dir: Path

    @property
    def world(self) -> Path:
        return self.run_dir / "world"

    @property
    def response_models(self) -> Path:
        """The embedded world's response models, with the mean gold score of each."""
        return self.world / "response_models.json"

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
    def rloo_proxy(self) -> Path:
        """Which reward model the run trains against, where it is not its own (rm_robust/rloo/proxy.py)."""
        return self.run_dir / "rloo" / "proxy.json"

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
        """The run directory of the reward model's Bradley-Terry twin and its evaluation."""
        return self.run_dir / "bt_twin"

    @property
    def metrics(self) -> Path:
        return self.run_dir / METRICS_NAME

    @property
    def summary(self) -> Path:
        return self.run_dir / "summary.json"

    @property
    def report(self) -> Path:
        return self.run_dir / "report.html"

    @property
    def stage_records(self) -> Path:
        """The folder with a file for each stage that is done."""
        return self.run_dir / "stages"

    def stage_record(self, stage: str) -> Path:
        """Return the file that says that the stage is done."""
        return self.stage_records / f"{stage}.json"

    def base_model_dir(self, config: PipelineConfig) -> str:
        """Return what SFT starts from: the user's model, or the one made from scratch."""
        return self.model_dir(config.model.path) if config.model.path else str(self.base_model)

    def sft_model_dir(self, config: PipelineConfig) -> str:
        """Return the policy before RLOO: the SFT stage's output, or the user's model when that stage is off."""
        if config.sft.enabled:
            return str(self.sft_checkpoint)
        assert config.model.path is not None
        return self.model_dir(config.model.path)

    def reward_model_base_dir(self, config: PipelineConfig) -> str:
        """Return the model that the reward model starts from. Its tokenizer tokenises the preferences."""
        base = config.reward_model.base_path
        return self.model_dir(base) if base else self.sft_model_dir(config)

    def model_dir(self, name: str) -> str:
        """Return the directory of a model that the config names: the user's own, or the run's copy of a hub's model."""
        return str(self.run_dir / "models" / name.replace("/", "--")) if is_hub_name(name) else name

    def training_state(self, stage: str) -> Path:
        """Return the folder of a training stage's states."""
        return self.run_dir / stage / "state"

    def is_done(self, stage: str) -> bool:
        """Return whether this run has recorded the stage as done, and its files are as they were then."""
        return self.stage_record(stage).exists() and self.damaged_file(stage) is None

    def damaged_file(self, stage: str) -> Path | None:
        """Return a file of a stage with a record that is missing or has other bytes than when it was recorded.

        None: there is none, or the run lies in an object store, where every folder is checked when it is fetched.
        """
        record = self.stage_record(stage)
        if uri_of(self.run_dir) is not None:
            return None
        try:
            files: dict[str, tuple[int, str | None]] = json.loads(record.read_text()).get("files", {})
        except (ValueError, AttributeError):
            return record
        for name, recorded in files.items():
            path = self.run_dir / name
            if not path.is_file() or list(_identity(path)) != list(recorded):
                return path
        return None

    def _files_of(self, stage: str) -> dict[str, tuple[int, str | None]]:
        """Return the identity of every file that a stage has left, by its path below the run directory."""
        if uri_of(self.run_dir) is not None:
            return {}
        left = [self.run_dir / name for name in FILES_OF[stage] if name != "models"]  # models/ is brought before a run
        paths = [path for top in left for path in ([top] if top.is_file() else sorted(top.rglob("*")))]
        return {str(path.relative_to(self.run_dir)): _identity(path) for path in paths if path.is_file()}

    def run_stage(self, stage: str, work: Callable[[], dict[str, Any]]) -> bool:
        """Do `work` unless the stage is done, and record its result (plain JSON) with the seconds it took.

        Returns whether the work was done now. Raises StorageError when the record cannot be written; the stage is then
        not done.
        """
        if self.is_done(stage):
            return False
        started = time.time()
        result = work()
        pull(self.run_dir)  # what other nodes have committed
        record = self.stage_record(stage)
        with storage_errors(record):
            record.parent.mkdir(exist_ok=True)
        write_json_atomic(
            record,
            {
                "stage": stage,
                "seconds": time.time() - started + self._earlier_seconds(stage, started),
                "finished_at": time.time(),
                "files": self._files_of(stage),
                **result,
            },
        )
        return True

    def _earlier_seconds(self, stage: str, started: float) -> float:
        """Return the seconds of the steps that earlier commands did, and that this one went on from."""
        lines = read_metrics(self.run_dir, stage)
        return sum(float(line.get("time/step_s", 0)) for line in lines if float(line.get("time", 0)) < started)

    def stage_result(self, stage: str) -> dict[str, Any]:
        """Return what a finished stage recorded. Raises DataError when it has not run."""
        path = self.stage_record(stage)
        if not path.exists():
            raise DataError(
                f"Stage {stage!r} has not run in {self.run_dir}; run it first (`rm-robust run` runs all in order)."
            )
        result: dict[str, Any] = json.loads(path.read_text())
        return result


def is_hub_name(name: str) -> bool:
    """Return whether a model is named as on the hub (`owner/name`, or `name` alone), and no such folder is here."""
    return HUB_NAME.fullmatch(name) is not None and not Path(name).is_dir()


def _identity(path: Path) -> tuple[int, str | None]:
    """Return the bytes of a file, and its SHA-256 where it is small; readers check the hashes of large ones."""
    num_bytes = path.stat().st_size
    return num_bytes, sha256(path) if num_bytes <= HASHED_BYTES else None


def share_stages(source: Path, run_dir: Path, stages: list[str]) -> None:
    """Begin a run with the stages that another run has done. A run directory that exists is left alone.

    Controlled twins begin so: they have the same files of these stages, and differ only in what comes later.
    """
    if uri_of(run_dir) is not None:
        pull_anew(run_dir)
        if RunLayout(run_dir).is_done(stages[-1]):
            return
        shutil.rmtree(run_dir, ignore_errors=True)  # an interrupted put left a part of it
    if run_dir.exists():
        return
    staging = run_dir.with_name(f".{run_dir.name}.partial")
    shutil.rmtree(staging, ignore_errors=True)
    for name in [name for stage in stages for name in (f"stages/{stage}.json", *FILES_OF[stage])]:
        path, target = source / name, staging / name
        if not path.exists():  # a stage that the run's config leaves out
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            shutil.copytree(path, target, copy_function=_link)
        else:
            _link(path, target)
    lines = (source / METRICS_NAME).read_text().splitlines()
    (staging / METRICS_NAME).write_text("".join(line + "\n" for line in lines if json.loads(line)["stage"] in stages))
    (staging / SHARED_NAME).touch()
    staging.rename(run_dir)
    if uri_of(run_dir) is not None:
        put_stages(run_dir, stages)


def put_stages(run_dir: Path, stages: list[str]) -> None:
    """Put the files of stages into the store, their records last: a record says that the rest is there."""
    for stage in stages:
        for path in [run_dir / name for name in FILES_OF[stage]]:
            if path.is_dir():
                with put_folder(path, path):
                    pass  # the copy has the files already
            elif path.exists():
                put_file(path)
    put_file(RunLayout(run_dir).metrics)
    for stage in stages:
        if RunLayout(run_dir).is_done(stage):  # the config may leave a stage out
            put_file(RunLayout(run_dir).stage_record(stage))


def _link(source: Path | str, target: Path | str) -> None:
    """Link a file, or copy it where the file system has no links.

    Files of a committed stage are replaced and never changed, so two runs may share them.
    """
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
