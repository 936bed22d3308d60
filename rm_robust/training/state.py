"""Exact resume of a training stage: the last committed engine state of all ranks, below `<root>/step-<n>/`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist

from rm_robust.errors import StorageError
from rm_robust.runs import files as run_files
from rm_robust.training.engines.engine import TrainEngine

Value = TypeVar("Value")
PREFIX = "step-"


@dataclass(frozen=True)
class _Ranks:
    """The ranks of torch.distributed, or a single process."""

    rank: int

    def barrier(self) -> None:
        barrier()

    def gather(self, value: Value) -> list[Value]:
        return from_every_rank(value)


def committed_steps(root: Path) -> list[int]:
    """Return the steps that have a committed state, oldest first."""
    names = run_files.committed_folders(root)
    return sorted(int(name.removeprefix(PREFIX)) for name in names if name.startswith(PREFIX))


def save_state(
    engine: TrainEngine, root: Path, num_steps_done: int, *, num_kept: int = 1, best_step: int | None = None
) -> None:
    """Commit the state after `num_steps_done` steps, then delete older states.

    The newest `num_kept` - 1 of the older states and that of `best_step` stay. Every rank calls it; it returns after
    the commit. Raises StorageError when a state cannot be written or an older one cannot be deleted.
    """
    target = folder_of(root, num_steps_done)
    run_files.commit_from_every_rank(target, engine.save, _Ranks(engine.rank))
    if engine.rank == 0:
        for step in committed_steps(root)[:-num_kept]:
            if step != best_step:
                _delete(folder_of(root, step), committed=target)
    barrier()


def _delete(folder: Path, *, committed: Path) -> None:
    """Delete an older state.

    Failing is an error and no warning: states are large, and the next ones would fill the storage.
    """
    try:
        run_files.delete(folder)
    except OSError as error:
        raise StorageError(
            f"{run_files.shown(folder)}, an older state, could not be deleted: {error}. {committed.name} is committed, "
            "and the same command goes on from it. Run it again when this machine may delete there."
        ) from error


def load_best(engine: TrainEngine, root: Path, best_step: int) -> None:
    """Load the state after `best_step` steps, which save_state kept. Every rank calls it."""
    _load(engine, folder_of(root, best_step))


def load_state(engine: TrainEngine, root: Path) -> int:
    """Load the newest committed state, and return its number of steps done (0: there is nothing to resume from)."""
    newest_step = (committed_steps(root) or [0])[-1]
    step = from_every_rank(newest_step)[0]  # rank 0's: a node may see an older listing of shared storage
    if step:
        _load(engine, folder_of(root, step))
    return step


def _load(engine: TrainEngine, folder: Path) -> None:
    engine.load(run_files.fetch(folder))
    barrier()
    run_files.release(folder)  # otherwise every node would keep every state that it ever went on from


def folder_of(root: Path, step: int) -> Path:
    """Return the folder of the state after `step` steps."""
    return root / f"{PREFIX}{step:07d}"


def from_every_rank(value: Value) -> list[Value]:
    """Return every rank's value, in rank order, on every rank."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def barrier() -> None:
    """Wait for every rank (a single process has nobody to wait for)."""
    if dist.is_initialized():
        dist.barrier()
