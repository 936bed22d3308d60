"""rm_robust in the RLOO bench: `run_rloo` on a local Ray cluster, held between rounds by its own reward.

    steps of a round:   0 … lag are not timed, the rest are timed

The pause lies in step 0, and the samples that were taken during the pause reach the next `lag` steps.

The run's scorer knows the step of a completion, because it scores P * K completions per step. At the first completion
of a new round, it does not answer until the parent allows it. The times come from metrics.jsonl, which has one line per
step. They reach from the end of the last untimed step to the end of the last timed one, and include Ray and metrics.
"""

import shutil
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Literal

from research.bench.rloo_figures import phases_of, seconds_per_step
from research.bench.rloo_policies import SEED, Policy
from research.bench.rloo_reward import WordCountScorer
from research.bench.rloo_turns import Round, Turns
from rm_robust.config.run import PipelineConfig
from rm_robust.runs.layout import RunLayout
from rm_robust.runs.metrics import MetricsLine, read_metrics
from rm_robust.scoring.contract import ScoreInput, ScoreReply

NEVER = 10**6
"""A number of steps that no round reaches."""
CPUS_OF_ACTOR = 0.05
"""The CPUs of an actor, as Ray counts them.

All contenders have their actors on one cluster of two CPUs, and take turns.
"""
POLL_S = 0.05
STEP_TIMEOUT_S = 300.0


@dataclass(frozen=True)
class Work:
    """The work of one step, the same for every trainer.

    All trainers use TRL 1.16's defaults of learning rate, KL coefficient and clip range.
    """

    num_prompts: int
    num_completions_per_prompt: int
    max_new_tokens: int
    learning_rate: float = 1e-6
    kl_coefficient: float = 0.05
    clip_range: float = 0.2

    @property
    def num_completions(self) -> int:
        return self.num_prompts * self.num_completions_per_prompt


@dataclass(frozen=True)
class Placement:
    """How a run of rm_robust uses the machine."""

    engine_threads: int
    trainer_threads: int
    num_engines: int = 1
    max_policy_lag: int = 0
    precision: Literal["float32", "bfloat16"] = "float32"


@dataclass(frozen=True)
class OurRun:
    """One run of rm_robust that takes part. `folder` is its run directory."""

    folder: Path
    policy: Policy
    work: Work
    placement: Placement


class TurnTakingScorer:
    """A Scorer that answers the first completions of a round only when it is this run's turn."""

    def __init__(self, turns: Turns, run: OurRun) -> None:
        self._turns, self._run_dir, self._scorer = turns, run.folder, WordCountScorer()
        self._completions_per_step = run.work.num_completions
        self._num_untimed = 1 + run.placement.max_policy_lag
        self._num_asked = 0
        self._num_timed: int | None = None
        self._round_ends_after = 0
        """The step of the run at which the current round ends."""
        self._lock = threading.Lock()

    def score(self, inputs: Sequence[ScoreInput]) -> ScoreReply:
        with self._lock:
            self._num_asked += sum(len(item.completions) for item in inputs)
            if self._num_asked > self._round_ends_after * self._completions_per_step:
                self._next_round()
        return self._scorer.score(inputs)

    def _next_round(self) -> None:
        done = None if self._num_timed is None else self._round(self._num_timed)
        self._num_timed = self._turns.next(done)
        self._round_ends_after += self._num_untimed + self._num_timed

    def _round(self, num_timed: int) -> Round:
        """Return the round of the last `num_timed` steps. An asynchronous run may still be training the last one."""
        deadline_s = time.monotonic() + STEP_TIMEOUT_S
        while len(lines := read_metrics(self._run_dir, "rloo")) < self._round_ends_after:
            assert time.monotonic() < deadline_s, (
                f"step {self._round_ends_after} did not end within {STEP_TIMEOUT_S:.0f} s"
            )
            time.sleep(POLL_S)
        return _as_round(lines[-num_timed - 1 :])


def _as_round(lines: list[MetricsLine]) -> Round:
    """Return the round whose last untimed step and timed steps are `lines`."""
    ends_s, timed = [float(line["time"]) for line in lines], lines[1:]
    return Round(
        seconds_per_step(ends_s), fmean(float(line["rloo/completion_tokens_mean"]) for line in timed), phases_of(timed)
    )


def run_config(run: OurRun) -> PipelineConfig:
    """Return the config of the run, without checkpoints and evaluation, and with gold scores in the first step only.

    Settings that are not named here have their defaults.
    """
    work, placement = run.work, run.placement
    rloo = {
        "num_steps": NEVER,
        "num_prompts_per_step": work.num_prompts,
        "num_completions_per_prompt": work.num_completions_per_prompt,
        "max_new_tokens": work.max_new_tokens,
        "kl_coefficient": work.kl_coefficient,
        "clip_range": work.clip_range,
        "truncated_completions": "keep",
        "truncated_penalty": 0,
        "max_policy_lag": placement.max_policy_lag,
        "gold_every_steps": NEVER,
        "evaluation": {"every_steps": 0},
        "optimizer": {"learning_rate": work.learning_rate, "schedule": "constant", "warmup_fraction": 0},
        "compute": {"precision": placement.precision},
        "trainers": {
            "num_workers": 1,
            "num_cpus_per_worker": CPUS_OF_ACTOR,
            "num_threads_per_worker": placement.trainer_threads,
        },
        "num_engines": placement.num_engines,
        "engine_num_cpus": CPUS_OF_ACTOR,
        "engine_num_threads": placement.engine_threads,
        "engine_dtype": placement.precision,
        "checkpoint_every_steps": NEVER,
        "num_sample_prompts": 0,
    }
    settings = {
        "name": "bench",
        "seed": SEED,
        "model": {"path": str(run.policy.model_dir)},
        "sft": {"enabled": False},
        "rloo": rloo,
    }
    return PipelineConfig.model_validate(settings)


def train_with_rm_robust(turns: Turns, run: OurRun) -> None:
    """Train on the cluster that RAY_ADDRESS names."""
    from rm_robust.cluster.session import connect_to_ray
    from rm_robust.rloo.controller import run_rloo

    shutil.copytree(run.policy.prompts_dir, RunLayout(run.folder).rloo_prompts)
    connect_to_ray()
    run_rloo(run_config(run), run.folder, proxy=TurnTakingScorer(turns, run), gold=WordCountScorer())
