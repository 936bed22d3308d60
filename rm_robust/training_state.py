"""Exact resume of a training stage: the last committed engine state below `<root>/step-<n>/`, written by all ranks into one shared folder."""

import shutil
from pathlib import Path

import torch.distributed as dist

from rm_robust.checkpoint import commit_directory
from rm_robust.train_engine import TrainEngine


def committed_steps(root: Path) -> list[int]:
    """Steps with a committed state, oldest first."""
    return sorted(int(folder.name.removeprefix("step-")) for folder in root.glob("step-*") if folder.is_dir())


def save_state(engine: TrainEngine, root: Path, num_steps_done: int) -> None:
    """Commit the state after `num_steps_done` steps and drop older ones. Every rank calls it; it returns after the commit."""
    staging = root / ".staging"
    if engine.rank == 0:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
    barrier()
    engine.save(staging)
    barrier()
    if engine.rank == 0:
        older = committed_steps(root)
        commit_directory(root / f"step-{num_steps_done:07d}", lambda folder: _move_into(staging, folder))
        for step in older:
            if step != num_steps_done:
                shutil.rmtree(root / f"step-{step:07d}")
    barrier()


def load_state(engine: TrainEngine, root: Path) -> int:
    """Load the newest committed state; returns its number of steps done (0: nothing to resume from)."""
    steps = committed_steps(root)
    if not steps:
        return 0
    engine.load(root / f"step-{steps[-1]:07d}")
    return steps[-1]


def barrier() -> None:
    """Wait for every rank (a single process has nobody to wait for)."""
    if dist.is_initialized():
        dist.barrier()


def _move_into(staging: Path, folder: Path) -> None:
    for entry in list(staging.iterdir()):
        entry.rename(folder / entry.name)
    staging.rmdir()
