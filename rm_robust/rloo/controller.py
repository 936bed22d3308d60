"""The RLOO loop: sample with vLLM, score against proxy and gold, update the policy, put the new weights into the engines.

prompts ─► engines (policy version v) ─► completions ─┬─► proxy + gold scores ─┬─► rewards ─► advantages ─► trainers ─► weights v+1 ─► engines
                                                      └─► KL to the reference ─┘
"""

import contextlib
import json
import logging
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ray
import torch
from tqdm import tqdm

from rm_robust.chat import ChatFormat
from rm_robust.config import PipelineConfig
from rm_robust.experiment_trackers import open_trackers
from rm_robust.records import PromptCompletions
from rm_robust.rloo.actors import RlooActors
from rm_robust.rloo.advantages import leave_one_out_advantages, rewards_of
from rm_robust.rloo.rollout import RolloutScores, check_completions, generation_requests, prompts_of_step, split_evenly
from rm_robust.rloo.step_metrics import rollout_metrics
from rm_robust.run_layout import RunLayout
from rm_robust.scoring import ScoreInput, Scorer
from rm_robust.token_files import TokenisedGroup, read_token_groups
from rm_robust.tracking import MetricsWriter, log_step, write_text_atomic

logger = logging.getLogger(__name__)

LOGGED = ("rloo/proxy_score_mean", "rloo/gold_score_mean", "rloo/kl_mean", "rloo/entropy_mean", "rloo/completion_tokens_mean", "time/step_s")


def run_rloo(config: PipelineConfig, run_dir: Path, *, proxy: Scorer, gold: Scorer) -> dict[str, Any]:
    """Train the policy to checkpoints/policy, resuming from the last committed state. Ray must be up, and both must answer."""
    with RlooActors(config, run_dir) as actors:
        return Controller(config, run_dir, actors, proxy, gold).run()


class Controller:
    """One step after the other; every completion is trained once, under the version that sampled it."""

    def __init__(self, config: PipelineConfig, run_dir: Path, actors: RlooActors, proxy: Scorer, gold: Scorer) -> None:
        self.config, self.settings, self.layout = config, config.rloo, RunLayout(run_dir)
        self.actors, self.proxy, self.gold = actors, proxy, gold
        self.chat = ChatFormat.load(self.layout.sft_model_dir(config))
        self.prompts = read_token_groups(self.layout.rloo_prompts / "scenario=rloo_prompts")
        self.pool = ThreadPoolExecutor(2, thread_name_prefix="scoring")
        self.times: dict[str, float] = {}

    def run(self) -> dict[str, Any]:
        """All steps not yet done. Returns the number of steps and the checkpoints that scored."""
        first_step = self.actors.num_steps_done
        _drop_samples_after(self.layout.rloo_samples, first_step)
        self.actors.publish(version=first_step)
        sinks = open_trackers(self.config, self.layout.run_dir, "rloo")
        with MetricsWriter(self.layout.run_dir, "rloo", resume_step=first_step, sinks=sinks) as writer, self.pool:
            for step in tqdm(range(first_step, self.settings.num_steps), desc="rloo", initial=first_step, total=self.settings.num_steps, mininterval=5):
                metrics = self.step(step)
                writer.write(step + 1, metrics)
                log_step(logger, "rloo", step + 1, self.settings.num_steps, metrics, LOGGED)
                if (step + 1) % self.settings.checkpoint_every_steps == 0 or step + 1 == self.settings.num_steps:
                    self.actors.save(step + 1)
        self.actors.commit(self.settings.num_steps)
        return {"num_steps": self.settings.num_steps, "resumed_from_step": first_step}

    def step(self, step: int) -> dict[str, float]:
        """One update: policy version `step` samples, version `step + 1` comes out. Returns the step's metrics."""
        self.times = {}
        started = time.perf_counter()
        prompts = prompts_of_step(self.prompts, step, num_prompts=self.settings.num_prompts_per_step, seed=self.config.seed)
        with self.timed("time/generate_s"):
            completions = self.generate(prompts, step)
        scoring = self.pool.submit(self.score, prompts, completions)
        with self.timed("time/measure_s"):
            measurements = self.actors.measure(completions)
        scores = self.result_of(scoring)
        kl_PK = torch.tensor([kl for m in measurements for kl in m.kl]).view(len(prompts), -1)
        truncated_PK = torch.tensor([[c.is_truncated for c in p.completions] for p in completions])
        rewards_PK = rewards_of(
            torch.tensor(scores.proxy),
            kl_PK,
            truncated_PK,
            kl_coefficient=self.settings.kl_coefficient,
            truncated_penalty=self.settings.truncated_penalty,
        )
        with self.timed("time/update_s"):
            update = self.actors.update(leave_one_out_advantages(rewards_PK), step=step)
        with self.timed("time/weight_sync_s"):
            self.actors.publish(version=step + 1)
        if step % self.settings.checkpoint_every_steps == 0 or step + 1 == self.settings.num_steps:
            self.keep_samples(step, prompts, completions, scores)
        metrics = rollout_metrics(completions, scores, measurements, rewards_PK=rewards_PK, kl_PK=kl_PK)
        return metrics | update | self.times | {"rloo/policy_version": step, "time/step_s": time.perf_counter() - started}

    def generate(self, prompts: list[TokenisedGroup], step: int) -> list[PromptCompletions]:
        """K completions of every prompt, all from policy version `step`, spread over the engines."""
        requests = generation_requests(prompts, self.settings, step=step, seed=self.config.seed, stop_token_id=self.chat.end_of_turn_id)
        parts = [requests[part] for part in split_evenly(len(requests), len(self.actors.engines))]
        answers = ray.get([engine.generate.remote(part) for engine, part in zip(self.actors.engines, parts, strict=True)])
        completions = [completion for answer in answers for completion in answer]
        check_completions(completions, requests, policy_version=step)
        return completions

    def score(self, prompts: list[TokenisedGroup], completions: list[PromptCompletions]) -> RolloutScores:
        """Proxy and gold scores of every completion, asked at the same time."""
        with self.timed("time/score_s"):
            inputs = [
                ScoreInput(prompt=prompt.prompt, completions=[self.chat.completion_text(c.token_ids) for c in answer.completions])
                for prompt, answer in zip(prompts, completions, strict=True)
            ]
            gold = self.pool.submit(self.gold.score, inputs)
            proxy = self.proxy.score(inputs)
            return RolloutScores(proxy.scores, gold.result().scores)

    def result_of(self, scoring: "Future[RolloutScores]") -> RolloutScores:
        with self.timed("time/wait_for_scores_s"):
            return scoring.result()

    def keep_samples(self, step: int, prompts: list[TokenisedGroup], completions: list[PromptCompletions], scores: RolloutScores) -> None:
        """Append the first completion of some prompts to rloo/samples.jsonl, for the report."""
        with self.layout.rloo_samples.open("a") as file:
            for p in range(min(self.settings.num_sample_prompts, len(prompts))):
                first = completions[p].completions[0]
                sample = {
                    "step": step + 1,
                    "prompt": prompts[p].prompt[-1]["content"],
                    "completion": self.chat.completion_text(first.token_ids),
                    "proxy_score": scores.proxy[p][0],
                    "gold_score": scores.gold[p][0],
                    "num_tokens": len(first.token_ids),
                }
                file.write(json.dumps(sample, ensure_ascii=False) + "\n")

    @contextlib.contextmanager
    def timed(self, key: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.times[key] = time.perf_counter() - started


def _drop_samples_after(path: Path, num_steps_done: int) -> None:
    """A resumed run writes the samples of redone steps again."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = path.read_text().rstrip("\n").split("\n") if path.exists() else []  # not splitlines: a completion may hold U+2028
    kept: list[str] = []
    for line in lines:
        try:
            if line and json.loads(line)["step"] <= num_steps_done:
                kept.append(line)
        except json.JSONDecodeError:
            continue  # torn by a kill; its step is redone
    write_text_atomic(path, "".join(line + "\n" for line in kept))
