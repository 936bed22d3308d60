"""The loop of SFT and reward-model training: steps, progress, metrics, checkpoints, exact resume. The maths comes in as `train_step`.

Data order is a pure function of (seed, step), so the position to resume from is the step number alone, for any number of workers.
"""

import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from rm_robust.config import OptimizerConfig
from rm_robust.tracking import MetricsWriter, log_step
from rm_robust.train_engine import TrainEngine, learning_rate_at

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoopSettings:
    """What the loop needs of a stage's config."""

    stage: str
    num_steps: int
    optimizer: OptimizerConfig
    checkpoint_every_steps: int
    logged_keys: tuple[str, ...]


def steps_in(num_rows: int, batch_size: int, num_epochs: float) -> int:
    """Optimiser steps of `num_epochs` passes over `num_rows`, rounded up."""
    return max(1, math.ceil(num_epochs * num_rows / batch_size))


def batch_indices(step: int, *, num_rows: int, batch_size: int, seed: int) -> list[int]:
    """Rows of optimiser step `step`: batches cut from an endless row of permutations, one an epoch, drawn from (seed, epoch).

    Every batch is full and no row is left out: a batch may reach over the end of an epoch.
    """
    rows: list[int] = []
    position = step * batch_size
    while len(rows) < batch_size:
        epoch, start = divmod(position + len(rows), num_rows)
        order = np.random.default_rng([seed, epoch]).permutation(num_rows)
        rows += order[start : start + batch_size - len(rows)].tolist()
    return rows


def rank_share(indices: list[int], *, rank: int, world_size: int) -> list[int]:
    """This rank's part of a global batch (strided, so that sizes differ by at most one)."""
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
) -> None:
    """Run steps first_step … num_steps - 1. `commit(n)` is called after n steps, by every rank, at intervals and at the end.

    `train_step(i)` leaves a gradient in the engine and returns metrics, "<stage>/num_tokens" (of all ranks) among them; `evaluate(n)` returns
    metrics, empty where nothing is due. Rank 0 alone writes metrics.
    """
    writer = MetricsWriter(run_dir, settings.stage, resume_step=first_step) if engine.rank == 0 else None
    bar = tqdm(total=settings.num_steps, initial=first_step, desc=settings.stage, disable=engine.rank != 0, mininterval=5)
    try:
        for step in range(first_step, settings.num_steps):
            started = time.perf_counter()
            metrics = train_step(step)
            learning_rate = learning_rate_at(step, settings.num_steps, settings.optimizer)
            metrics[f"{settings.stage}/gradient_norm"] = engine.step(learning_rate)
            metrics[f"{settings.stage}/learning_rate"] = learning_rate
            metrics["time/step_s"] = time.perf_counter() - started
            metrics["throughput/tokens_per_s"] = metrics[f"{settings.stage}/num_tokens"] / metrics["time/step_s"]
            if evaluate is not None:
                metrics |= evaluate(step + 1)
            if writer is not None:
                writer.write(step + 1, metrics)
                log_step(logger, settings.stage, step + 1, settings.num_steps, metrics, settings.logged_keys)
            bar.update()
            if (step + 1) % settings.checkpoint_every_steps == 0 or step + 1 == settings.num_steps:
                commit(step + 1)
    finally:
        bar.close()
        if writer is not None:
            writer.close()
