"""Exact resume of a training stage: the last committed engine state below `<root>/step-<n>/`, written by all ranks into one shared folder."""

import shutil
from pathlib import Path

import torch.distributed as dist

from rm_robust.checkpoint import commit_directory, storage_errors
from rm_robust.train_engine import TrainEngine


def committed_steps(root: Path) -> list[int]:
    """Steps with a committed state, oldest first."""
    return sorted(int(folder.name.removeprefix("step-")) for folder in root.glob("step-*") if folder.is_dir())


def save_state(engine: TrainEngine, root: Path, num_steps_done: int, *, num_kept: int = 1, best_step: int | None = None) -> None:
    """Commit the state after `num_steps_done` steps; of the older ones keep `num_kept` - 1 and that of `best_step`.

    Every rank calls it; it returns after the commit.
    """
    staging = root / ".staging"
    with storage_errors(root):
        if engine.rank == 0:
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir(parents=True)
        barrier()
        engine.save(staging)
    barrier()
    if engine.rank == 0:
        commit_directory(root / f"step-{num_steps_done:07d}", lambda folder: _move_into(staging, folder))
        for step in committed_steps(root)[:-num_kept]:
            if step != best_step:
                shutil.rmtree(root / f"step-{step:07d}")
    barrier()


def load_best(engine: TrainEngine, root: Path, best_step: int) -> None:
    """Load the state after `best_step` steps, which save_state kept. Every rank calls it."""
    engine.load(root / f"step-{best_step:07d}")


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
