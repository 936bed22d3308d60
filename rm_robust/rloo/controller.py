"""Run the RLOO loop: sample with vLLM, score completions as they finish, update the policy and then the engines.

    prompts ─► engines (policy version v) ─► completions ─┬─► reward sources, gold ─┬─► rewards ─► advantages ─┐
                                                          └─► KL to the reference  ─┘                          │
                                            engines ◄─ weights v+1 ◄─ trainers ◄───────────────────────────────┘

With max_policy_lag = n, the engines sample the completions of the next n steps while this step trains. An engine
answers one call at a time, in order. New weights therefore reach it between two rollouts, and the policy version that
samples a step depends on nothing but the step.
"""

import contextlib
import logging
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from rm_robust.config.run import PipelineConfig
from rm_robust.data.chat import ChatFormat
from rm_robust.data.token_files import TokenisedGroup, read_token_groups
from rm_robust.errors import RolloutError
from rm_robust.rloo.actors import RlooActors, TrainersLostError
from rm_robust.rloo.advantages import StepScores, advantages_of, next_kl_coefficient, shaped_scores
from rm_robust.rloo.evaluation import PolicyEvaluation
from rm_robust.rloo.metrics import rollout_metrics
from rm_robust.rloo.monitor import OveroptimisationMonitor
from rm_robust.rloo.reward_sources import RewardSources, StepInProgress
from rm_robust.rloo.rollout import (
    EnginesLostError,
    GenerationRequest,
    PromptCompletions,
    Rollout,
    check_completions,
    generation_requests,
    held_prompts,
    prompt_row,
    prompts_of_step,
    score_input,
)
from rm_robust.runs import files as run_files
from rm_robust.runs.layout import RunLayout
from rm_robust.runs.lines import append_rows, as_line, rows_of
from rm_robust.runs.metrics import MetricsWriter, log_step, planned_steps, read_metrics
from rm_robust.runs.trackers import open_trackers
from rm_robust.scoring.contract import Scorer
from rm_robust.training.engines.engine import learning_rate_at
from rm_robust.training.loop import BestStep

logger = logging.getLogger(__name__)

LOGGED = (
    "rloo/proxy_score_mean",
    "rloo/gold_score_mean",
    "rloo/kl_mean",
    "rloo/entropy_mean",
    "rloo/completion_tokens_mean",
    "time/step_s",
)
"""The metrics in the log line of a step."""


@dataclass
class Faults:
    """Counts of what was lost and what was done again since this process began the run."""

    engines_replaced: int = 0
    trainers_restarted: int = 0
    prompts_redone: int = 0
    steps_redone: int = 0


def run_rloo(
    config: PipelineConfig,
    run_dir: Path,
    *,
    proxy: Scorer,
    gold: Scorer,
    first_actors: RlooActors | None = None,
    wait_for_scorers: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Train the policy, commit it as the policy checkpoint, and return what the stage reports about itself.

    Training resumes from the last committed state. Ray must be up. A caller may have begun to start the `first_actors`,
    and both scorers must answer once `wait_for_scorers` has returned, so that all can start at the same time. Lost
    engines and trainers are replaced. Raises what `wait_for_scorers` raises, RolloutError when more than
    rloo.max_restarts of either are lost without a committed step between them, and ClusterError when the nodes that
    they need do not come.
    """
    faults, resumed_from, num_restarts = Faults(), None, 0
    next_actors = first_actors or RlooActors(config, run_dir)
    wait_for_scorers()
    while True:
        controller = None
        try:
            with next_actors as actors, RewardSources(config.rloo, proxy=proxy, gold=gold) as rewards:
                resumed_from = actors.num_steps_done if resumed_from is None else resumed_from
                controller = Controller(config, run_dir, actors, rewards, gold, faults)
                return {"num_steps": controller.run(), "resumed_from_step": resumed_from, **vars(faults)}
        except TrainersLostError as error:
            num_restarts = 1 if controller is not None and controller.has_committed else num_restarts + 1
            if num_restarts > config.rloo.max_restarts:
                raise RolloutError(
                    f"{error} It happened {num_restarts} times without a committed step between; "
                    f"rloo.max_restarts = {config.rloo.max_restarts}. "
                    "Look in Ray's logs for the reason; the same command resumes."
                ) from error
            faults.trainers_restarted += 1
            faults.steps_redone += 0 if controller is None else controller.version - controller.num_steps_committed
            logger.warning("%s Continuing from the last committed step.", error)
            next_actors = RlooActors(config, run_dir)


@dataclass(frozen=True)
class Sampled:
    """A step whose completions are being sampled and scored."""

    step: int
    prompts: list[TokenisedGroup]
    rollout: Rollout
    scoring: StepInProgress


class Controller:
    """Runs one step after the other and trains on every completion once."""

    def __init__(
        self,
        config: PipelineConfig,
        run_dir: Path,
        actors: RlooActors,
        rewards: RewardSources,
        gold: Scorer,
        faults: Faults,
    ) -> None:
        self.config, self.settings, self.layout = config, config.rloo, RunLayout(run_dir)
        self.actors, self.rewards, self.faults = actors, rewards, faults
        self.version = self.num_steps_committed = self.first_step = actors.num_steps_done
        self.chat = ChatFormat.load(self.layout.sft_model_dir(config))
        self.prompts, evaluation_prompts = self.prompts_and_held()
        rewards.check_columns(set(self.prompts[0].columns))
        self.evaluation = PolicyEvaluation(
            self.layout,
            evaluation_prompts,
            self.settings,
            chat=self.chat,
            seed=config.seed,
            gold=gold,
            sample=self.sample,
            actors=actors,
        )
        self.monitor = OveroptimisationMonitor(self.settings.monitor)
        self.best = BestStep("rloo/eval/gold_mean", patience=None)
        self.kl_coefficient = self.settings.kl_coefficient
        self.under_way: deque[Sampled] = deque()
        self.num_lost_since_commit = 0
        self.num_planned_steps = self.settings.num_steps
        self.times: dict[str, float] = {}

    def prompts_and_held(self) -> tuple[list[TokenisedGroup], list[TokenisedGroup]]:
        """Return the prompts to train on, and those that are held out for the evaluation."""
        prompts = read_token_groups(self.layout.rloo_prompts / "scenario=rloo_prompts")
        return held_prompts(
            prompts,
            self.settings.evaluation.num_prompts if self.settings.evaluation.every_steps else 0,
            seed=self.config.seed,
        )

    def run(self) -> int:
        """Do all remaining steps and return the policy's number of steps.

        It is less than num_steps if the monitor stops the run.
        """
        self.resume()
        self.update_engines()
        sinks = open_trackers(self.config, self.layout.run_dir, "rloo")
        with MetricsWriter(
            self.layout.run_dir, "rloo", resume_step=self.version, num_steps=self.settings.num_steps, sinks=sinks
        ) as writer:
            self.evaluation.sample_baseline(self.version)
            for step in range(self.version, self.settings.num_steps):
                if self.monitor.must_stop:
                    break
                metrics = self.step(step)
                metrics |= self.watch(metrics)
                writer.write(self.version, metrics)
                log_step(logger, "rloo", self.version, self.settings.num_steps, metrics, LOGGED)
                if self.version % self.settings.checkpoint_every_steps == 0 or self.is_last:
                    writer.persist()
                    run_files.persist(self.layout.rloo_samples)
                    self.actors.save(self.version)
                    self.num_steps_committed, self.num_lost_since_commit = self.version, 0
        for sampled in self.under_way:
            sampled.rollout.abandon()
        self.actors.commit(self.layout.policy_checkpoint, self.version)
        return self.version

    def step(self, step: int) -> dict[str, float]:
        """Update the policy from version `step` to `step + 1` and return the step's metrics."""
        self.times = {}
        started = time.perf_counter()
        with self.timed("time/generate_s"):
            sampled = self.sampled_for(step)
            prompts, completions = sampled.prompts, self.finish(sampled.rollout)
            oldest = max(0, step - self.settings.max_policy_lag)
            check_completions(completions, sampled.rollout.requests, policy_versions=range(oldest, step + 1))
        with self.timed("time/measure_s"):
            measurements = self.actors.measure(completions)
        with self.timed("time/wait_for_scores_s"):
            scores = self.rewards.collect(sampled.scoring, len(prompts))
        kl_PK = torch.tensor([kl for m in measurements for kl in m.kl]).view(len(prompts), -1)
        truncated_PK = torch.tensor([[c.is_truncated for c in p.completions] for p in completions])
        shaped_PK = shaped_scores(
            scores.rewards_PK, normalise=self.settings.normalise_scores, clip_range=self.settings.score_clip_range
        )
        advantages = advantages_of(shaped_PK, kl_PK, truncated_PK, self.settings, kl_coefficient=self.kl_coefficient)
        with self.timed("time/update_s"):
            update = self.actors.update(advantages.advantages_PK, step=step, learning_rate=self.learning_rate(step))
        self.version = step + 1
        with self.timed("time/weight_sync_s"):
            self.update_engines()
        self.keep_samples(prompts, completions, scores)
        metrics = rollout_metrics(completions, scores, measurements, advantages, kl_PK=kl_PK) | update | self.times
        metrics |= {
            "rloo/policy_lag": step - completions[0].completions[0].policy_version,
            "rloo/kl_coefficient": self.kl_coefficient,
        }
        if self.settings.target_kl is not None:
            self.kl_coefficient = self.next_kl_coefficient(
                self.kl_coefficient, metrics["rloo/kl_mean"], self.settings.target_kl
            )
        return metrics | {"rloo/policy_version": step, "time/step_s": time.perf_counter() - started}

    def learning_rate(self, step: int) -> float:
        """Return the learning rate of step `step`."""
        return self.monitor.learning_rate_factor * learning_rate_at(
            step, self.num_planned_steps, self.settings.optimizer
        )

    def sampled_for(self, step: int) -> Sampled:
        """Return the step with its rollout, after starting every rollout that max_policy_lag allows by now."""
        first_new_step = self.under_way[-1].step + 1 if self.under_way else step
        for new_step in range(first_new_step, min(step + self.settings.max_policy_lag + 1, self.settings.num_steps)):
            prompts = prompts_of_step(
                self.prompts, new_step, num_prompts=self.settings.num_prompts_per_step, seed=self.config.seed
            )
            requests = generation_requests(
                prompts, self.settings, step=new_step, seed=self.config.seed, stop_token_id=self.chat.end_of_turn_id
            )
            scoring = self.rewards.begin(with_gold=new_step % self.settings.gold_every_steps == 0)
            submit = partial(self.submit, scoring, prompts, new_step)
            self.under_way.append(Sampled(new_step, prompts, self.start(requests, on_finished=submit), scoring))
        return self.under_way.popleft()

    def submit(
        self,
        scoring: StepInProgress,
        prompts: list[TokenisedGroup],
        step: int,
        position: int,
        completions: PromptCompletions,
    ) -> None:
        """Ask for the scores of one prompt's completions while other prompts of the step are still being sampled."""
        prompt = prompts[position]
        item, row = score_input(prompt, completions, self.chat), prompt_row(prompt, completions, step=step)
        self.rewards.submit(scoring, position, item, row)

    def sample(self, requests: list[GenerationRequest]) -> list[PromptCompletions]:
        """Return completions from the current policy version without asking for their scores."""
        completions = self.finish(self.start(requests, on_finished=lambda position, completions: None))
        check_completions(completions, requests, policy_versions=range(self.version, self.version + 1))
        return completions

    def start(
        self, requests: list[GenerationRequest], *, on_finished: Callable[[int, PromptCompletions], None]
    ) -> Rollout:
        """Start to sample on all engines; returns at once."""
        rollout = Rollout(requests, on_finished=on_finished, silence_s=self.settings.generation_silence_s)
        rollout.start(self.actors.engines)
        return rollout

    def finish(self, rollout: Rollout) -> list[PromptCompletions]:
        """Wait for all completions of the rollout and return them.

        Prompts that were lost with an engine are sampled again, after all engines have confirmed the current version.
        """
        while True:
            try:
                completions = rollout.wait()
                self.faults.prompts_redone += rollout.num_redone
                return completions
            except EnginesLostError as error:
                if self.replace(error.engines):
                    self.update_engines()
                rollout.start(self.actors.engines)

    def update_engines(self) -> None:
        """Bring every engine to the current policy version, and replace the engines that cannot confirm it."""
        while True:
            try:
                self.actors.publish_weights(version=self.version)
            except RolloutError as error:
                lost = self.actors.lost_engines()
                if not lost:
                    raise
                logger.warning("%s", error)
                self.replace(lost)
            else:
                return

    def replace(self, lost: list[Any]) -> bool:
        """Replace those of the `lost` engines that are still in use by new ones, which have no confirmed weights yet.

        Returns whether any was replaced. Raises RolloutError when too many were lost since the last committed step.
        """
        num_replaced = self.actors.replace_engines(lost)
        self.faults.engines_replaced += num_replaced
        self.num_lost_since_commit += num_replaced
        if self.num_lost_since_commit > self.settings.max_restarts:
            raise RolloutError(
                f"{self.num_lost_since_commit} engines were lost without a committed step between; "
                f"rloo.max_restarts = {self.settings.max_restarts}. "
                "Look in Ray's logs for the reason; the same command resumes."
            )
        return num_replaced > 0

    def watch(self, metrics: dict[str, float]) -> dict[str, float]:
        """Return the metrics of monitor and evaluation; commit the policy if it has the best gold score so far."""
        watch_metrics = self.monitor.observe(
            self.version,
            proxy_mean=metrics["rloo/proxy_score_mean"],
            proxy_std=metrics["rloo/proxy_score_std"],
            gold_mean=metrics.get("rloo/gold_score_mean"),
            gold_std=metrics.get("rloo/gold_score_std"),
        )
        every = self.settings.evaluation.every_steps
        if every and (self.version % every == 0 or self.is_last):
            with self.timed("time/evaluation_s"):
                watch_metrics |= self.evaluation.metrics()
            watch_metrics["time/evaluation_s"] = self.times["time/evaluation_s"]
            if self.best.record(self.version, watch_metrics):
                self.actors.commit(self.layout.best_policy_checkpoint, self.version)
        return watch_metrics

    def resume(self) -> None:
        """Restore the monitor, the best gold score and the KL coefficient from metrics.jsonl.

        The samples of steps that were not committed are dropped.
        """
        _drop_samples_after(self.layout.rloo_samples, self.version)
        self.monitor.resume(self.layout.run_dir, self.version)
        self.best.resume(self.layout.run_dir, "rloo", self.version)
        self.num_planned_steps = planned_steps(
            self.layout.run_dir, "rloo", first_step=self.version, num_steps=self.settings.num_steps
        )
        if self.settings.target_kl is not None:
            for line in read_metrics(self.layout.run_dir, "rloo"):
                if line["step"] == self.version:
                    self.kl_coefficient = self.next_kl_coefficient(
                        float(line["rloo/kl_coefficient"]), float(line["rloo/kl_mean"]), self.settings.target_kl
                    )

    def next_kl_coefficient(self, coefficient: float, kl_mean: float, target_kl: float) -> float:
        return next_kl_coefficient(
            coefficient, kl_mean, target_kl=target_kl, horizon_steps=self.settings.kl_horizon_steps
        )

    @property
    def has_committed(self) -> bool:
        """Return whether this controller has committed a step."""
        return self.num_steps_committed > self.first_step

    @property
    def is_last(self) -> bool:
        """Return whether the step that was just done is the last one of the run."""
        return self.version == self.settings.num_steps or self.monitor.must_stop

    def keep_samples(
        self, prompts: list[TokenisedGroup], completions: list[PromptCompletions], scores: StepScores
    ) -> None:
        """Append the first completion of some prompts to rloo/samples.jsonl for the report.

        It does so at the first step of the run, at each first step after a checkpoint, and at step num_steps.
        """
        if (self.version - 1) % self.settings.checkpoint_every_steps and self.version != self.settings.num_steps:
            return
        samples = [
            {
                "step": self.version,
                "prompt": prompts[p].prompt[-1]["content"],
                "completion": self.chat.completion_text(completions[p].completions[0].token_ids),
                "num_tokens": len(completions[p].completions[0].token_ids),
                **scores.of_completion(p, 0),
            }
            for p in range(min(self.settings.num_sample_prompts, len(prompts)))
        ]
        with run_files.storage_errors(self.layout.rloo_samples):
            append_rows(self.layout.rloo_samples, samples)

    @contextlib.contextmanager
    def timed(self, key: str) -> Iterator[None]:
        """Store the seconds that the body takes in `times[key]`."""
        started = time.perf_counter()
        yield
        self.times[key] = time.perf_counter() - started


def _drop_samples_after(path: Path, num_steps_done: int) -> None:
    """Drop the samples of steps that a resumed run does again and writes again."""
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = [row for _, row in rows_of(path, row_name="a sample") if row["step"] <= num_steps_done]
    run_files.write_text(path, "".join(map(as_line, kept)))
