"""The loop of SFT and reward-model training: steps, progress, metrics, checkpoints and exact resume.

`train_step` brings the maths. The data order is a pure function of (seed, step), so the position to resume from is the
step number alone, for any number of workers. Which evaluation was the best is a pure function of the metrics logged so
far, so a resumed run agrees about it.
"""

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch.distributed as dist

from rm_robust.config.shared import OptimizerConfig
from rm_robust.runs.metrics import MetricsSink, MetricsWriter, log_step, planned_steps, read_metrics
from rm_robust.training.engines.engine import TrainEngine, learning_rate_at
from rm_robust.training.state import from_every_rank

logger = logging.getLogger(__name__)


@dataclass
class BestStep:
    """The evaluations of one metric, of which the highest is the best."""

    metric: str
    patience: int | None
    """Number of evaluations without a new best after which training stops; None: it never stops early."""
    values: dict[int, float] = field(default_factory=dict)
    """The metric's value by the number of steps done."""

    def record(self, num_steps_done: int, metrics: dict[str, float]) -> bool:
        """Take the metric if it was evaluated here; return True when it is the best so far.

        A later value that equals the best is not a new best.
        """
        if self.metric not in metrics:
            return False
        self.values[num_steps_done] = metrics[self.metric]
        return self.step == num_steps_done

    @property
    def step(self) -> int | None:
        """Return the number of steps done at the best evaluation; None before the first evaluation."""
        return max(self.values, key=lambda step: (self.values[step], -step), default=None)

    @property
    def is_over(self) -> bool:
        return (
            self.patience is not None
            and self.step is not None
            and sum(step > self.step for step in self.values) >= self.patience
        )

    def resume(self, run_dir: Path, stage: str, first_step: int) -> None:
        """Take over the evaluations of the first `first_step` steps. Every rank calls it, and rank 0 reads them."""
        logged: list[dict[int, float]] = [{}]
        if not dist.is_initialized() or dist.get_rank() == 0:
            lines = read_metrics(run_dir, stage)
            logged[0] = {
                int(line["step"]): float(line[self.metric])
                for line in lines
                if self.metric in line and int(line["step"]) <= first_step
            }
        if dist.is_initialized():
            dist.broadcast_object_list(logged)
        self.values = logged[0]


@dataclass(frozen=True)
class LoopSettings:
    """What the loop needs from a stage's config."""

    stage: str
    num_steps: int
    optimizer: OptimizerConfig
    checkpoint_every_steps: int
    logged_keys: tuple[str, ...]
    flops_per_token: float = 0.0
    """Floating-point operations of the forward and backward pass of one unique token."""
    peak_flops: float | None = None
    """Floating-point operations a second of all workers together; None: no utilisation is logged."""


def steps_in(num_rows: int, batch_size: int, num_epochs: float) -> int:
    """Return the number of optimiser steps of `num_epochs` passes over `num_rows`, rounded up."""
    return max(1, math.ceil(num_epochs * num_rows / batch_size))


def batch_indices(step: int, *, num_rows: int, batch_size: int, seed: int) -> list[int]:
    """Return the rows of optimiser step `step`.

    Batches are cut from an endless sequence of permutations, one for each epoch, drawn from (seed, epoch). Every batch
    is full and no row is left out: a batch may reach past the end of an epoch.
    """
    rows: list[int] = []
    position = step * batch_size
    while len(rows) < batch_size:
        epoch, start = divmod(position + len(rows), num_rows)
        order = np.random.default_rng([seed, epoch]).permutation(num_rows)
        rows += order[start : start + batch_size - len(rows)].tolist()
    return rows


def rank_share(indices: list[int], *, rank: int, world_size: int) -> list[int]:
    """Return this rank's part of a global batch (strided, so that sizes differ by at most one)."""
    return indices[rank::world_size]


def run_loop(
    engine: TrainEngine,
    settings: LoopSettings,
    *,
    first_step: int,
    run_dir: Path,
    train_step: Callable[[int], dict[str, float]],
    evaluate: Callable[[int], dict[str, float]] | None,
    commit: Callable[[int], None],
    best: BestStep | None = None,
    is_reclaimed: Callable[[], bool] = lambda: False,
    trackers: Callable[[], Sequence[MetricsSink]] = tuple,
) -> int:
    """Run steps first_step … num_steps - 1, or until `best` says that it is over; return the number of steps done.

    Every rank calls `commit(n)` after n steps: at intervals, at every new best evaluation, once when `is_reclaimed()`
    says that a machine is about to be taken away, and at the end. `is_reclaimed()` is asked after every step and must
    give the same answer on every rank.

    `train_step(i)` leaves a gradient in the engine and returns metrics, among them "<stage>/num_tokens" (of all ranks).
    `evaluate(n)` returns metrics, and an empty dict where none are due. Rank 0 alone writes metrics, also to
    `trackers()`.
    """
    num_planned = 0
    if engine.rank == 0:
        num_planned = planned_steps(run_dir, settings.stage, first_step=first_step, num_steps=settings.num_steps)
    num_planned = from_every_rank(num_planned)[0]
    writer = None
    if engine.rank == 0:
        writer = MetricsWriter(
            run_dir, settings.stage, resume_step=first_step, num_steps=settings.num_steps, sinks=trackers()
        )
    if best is not None:
        best.resume(run_dir, settings.stage, first_step)
    num_done = first_step
    is_saved_for_reclaim = False
    try:
        while num_done < settings.num_steps and not (best is not None and best.is_over):
            step = num_done
            started = time.perf_counter()
            metrics = train_step(step)
            learning_rate = learning_rate_at(step, num_planned, settings.optimizer)
            metrics[f"{settings.stage}/gradient_norm"] = engine.step(learning_rate)
            metrics[f"{settings.stage}/learning_rate"] = learning_rate
            metrics["time/step_s"] = time.perf_counter() - started
            metrics |= throughput(metrics, settings) | {"throughput/num_workers": engine.world_size}
            if evaluate is not None:
                started = time.perf_counter()
                evaluation = evaluate(step + 1)
                metrics |= evaluation | ({"time/evaluate_s": time.perf_counter() - started} if evaluation else {})
            is_best = best is not None and best.record(step + 1, metrics)
            num_done = step + 1
            if writer is not None:
                writer.write(step + 1, metrics)
                log_step(logger, settings.stage, step + 1, settings.num_steps, metrics, settings.logged_keys)
            is_over = num_done == settings.num_steps or (best is not None and best.is_over)
            is_last_chance = not is_saved_for_reclaim and is_reclaimed()
            is_saved_for_reclaim |= is_last_chance
            if num_done % settings.checkpoint_every_steps == 0 or is_best or is_over or is_last_chance:
                if writer is not None:
                    writer.persist()
                commit(num_done)
    finally:
        if writer is not None:
            writer.close()
    return num_done


def throughput(metrics: dict[str, float], settings: LoopSettings) -> dict[str, float]:
    """Return the tokens a second, and the utilisation from unique tokens.

    A shared prompt counts once in unique tokens, and with each completion in the others.
    """
    num_tokens, seconds = metrics[f"{settings.stage}/num_tokens"], metrics["time/step_s"]
    repeated = metrics.get(f"{settings.stage}/num_repeated_tokens", num_tokens)
    rates = {"throughput/tokens_per_s": repeated / seconds, "throughput/unique_tokens_per_s": num_tokens / seconds}
    if settings.peak_flops is not None:
        rates["throughput/utilisation"] = settings.flops_per_token * num_tokens / seconds / settings.peak_flops
    return rates
