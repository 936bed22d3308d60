"""Exact resume of a training stage: the last committed engine state below `<root>/step-<n>/`, written by all ranks into one shared folder.

In an object store nothing is shared: every rank writes a folder of its own and uploads it, and rank 0 commits all of them as one.
"""

import shutil
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist

from rm_robust.errors import StorageError
from rm_robust.runs.storage.commits import commit_directory, storage_errors
from rm_robust.runs.storage.copies import delete_copy, shown, uri_of
from rm_robust.runs.storage.generations import commit_generation, committed_in, delete_folder, new_generation, put_part
from rm_robust.runs.storage.transfer import pull_folder
from rm_robust.training.engines.engine import TrainEngine

Value = TypeVar("Value")


def committed_steps(root: Path) -> list[int]:
    """Steps with a committed state, oldest first."""
    names = (
        [folder.name for folder in root.glob("step-*") if folder.is_dir()]
        if uri_of(root) is None
        else committed_in(root)
    )
    return sorted(int(name.removeprefix("step-")) for name in names)


def save_state(
    engine: TrainEngine, root: Path, num_steps_done: int, *, num_kept: int = 1, best_step: int | None = None
) -> None:
    """Commit the state after `num_steps_done` steps; of the older ones keep `num_kept` - 1 and that of `best_step`.

    Every rank calls it; it returns after the commit. Raises StorageError when a state cannot be written or an older one not be deleted.
    """
    target, in_store = folder_of(root, num_steps_done), uri_of(root) is not None
    staging = root / (f".staging-{engine.rank}" if in_store else ".staging")
    with storage_errors(root):
        if in_store or engine.rank == 0:
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir(parents=True)
        barrier()
        engine.save(staging)
    barrier()
    if in_store:
        _commit_parts(staging, target, is_leader=engine.rank == 0)
    elif engine.rank == 0:
        commit_directory(target, lambda folder: _move_into(staging, folder))
    if engine.rank == 0:
        for step in committed_steps(root)[:-num_kept]:
            if step != best_step:
                _delete(folder_of(root, step), committed=target)
    barrier()


def _commit_parts(staging: Path, target: Path, *, is_leader: bool) -> None:
    """Each rank uploads what it has written; rank 0 commits when all have."""
    generation = from_every_rank(new_generation())[0]
    with storage_errors(target):
        own = put_part(staging, target, generation)
    parts = from_every_rank(own)
    if is_leader:
        with storage_errors(target):
            commit_generation(target, generation, parts)
    barrier()
    shutil.rmtree(staging)


def _delete(folder: Path, *, committed: Path) -> None:
    """An older state. That it stays is an error and no warning: states are large, and the next ones would fill the storage."""
    try:
        shutil.rmtree(folder) if uri_of(folder) is None else delete_folder(folder)
    except OSError as error:
        raise StorageError(
            f"{shown(folder)}, an older state, could not be deleted: {error}. {committed.name} is committed, and the same command goes on from it. "
            "Run it again when this machine may delete there."
        ) from error


def load_best(engine: TrainEngine, root: Path, best_step: int) -> None:
    """Load the state after `best_step` steps, which save_state kept. Every rank calls it."""
    _load(engine, folder_of(root, best_step))


def load_state(engine: TrainEngine, root: Path) -> int:
    """Load the newest committed state; returns its number of steps done (0: nothing to resume from)."""
    step = from_every_rank((committed_steps(root) or [0])[-1])[
        0
    ]  # rank 0's: a node may see an older listing of shared storage
    if step:
        _load(engine, folder_of(root, step))
    return step


def _load(engine: TrainEngine, folder: Path) -> None:
    engine.load(pull_folder(folder))
    barrier()
    delete_copy(folder)  # of an object store: other nodes would keep every state that they ever went on from


def folder_of(root: Path, step: int) -> Path:
    return root / f"step-{step:07d}"


def from_every_rank(own: Value) -> list[Value]:
    """In rank order."""
    if not dist.is_initialized():
        return [own]
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, own)
    return found


def barrier() -> None:
    """Wait for every rank (a single process has nobody to wait for)."""
    if dist.is_initialized():
        dist.barrier()


def _move_into(staging: Path, folder: Path) -> None:
    for entry in list(staging.iterdir()):
        entry.rename(folder / entry.name)
    staging.rmdir()
