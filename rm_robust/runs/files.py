"""The one door to a run's files: local disk, a shared file system and an object store behave alike behind it.

A path stands for a file of a run, wherever the run lies. Nobody outside rm_robust/runs/ asks whether the path is the
file itself or this node's copy of an object; the functions here do what each case needs.

    name     locate, shown, is_reachable             text that a user gives -> path -> text for messages
    read     fetch, refresh, refresh_records         bring what is committed to this node
    write    write_text, write_json, persist         a file: replaced as a whole, or appended to and then persisted
             commit, commit_from_every_rank          a folder: whole or not at all, written by one process or all ranks
             written_by_any_node                     a folder that tasks on all nodes write, for `commit`
             committed_folders, delete, release      older folders
             delete_file                             a file
    begin    begin, forget_uncommitted               delete what a killed process left

Ray Train's own checkpoints (`ray.train.report`, `storage_path`, `num_to_keep`) do not serve here. Ray 2.60 copies the
files to their final place one by one, without sync or hash, and then overwrites a JSON list of them in place. A kill
can leave a folder that looks whole, or a torn list. A report counts only after the controller has polled it, so a
worker that dies right after it loses the newest state. Only workers of a Ray Train run can report and resume, but
drivers, tasks, actors and replicas also write and read states, checkpoints, token files and evaluations. `num_to_keep`
cannot keep the newest and the best state alone. Ray Train still gets `storage_path`, for its own records.
"""

import functools
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

import pyarrow.fs as pafs

from rm_robust.runs.storage.commits import commit_directory as commit
from rm_robust.runs.storage.commits import storage_errors
from rm_robust.runs.storage.commits import write_json_atomic as write_json
from rm_robust.runs.storage.commits import write_text_atomic as write_text
from rm_robust.runs.storage.copies import copies_of_ones_own as read_only
from rm_robust.runs.storage.copies import delete_copy as release
from rm_robust.runs.storage.copies import local_path as locate
from rm_robust.runs.storage.copies import shown, uri_of
from rm_robust.runs.storage.filesystems import filesystem_of, is_uri, refuse_password, unreachable
from rm_robust.runs.storage.generations import (
    StoredFile,
    commit_generation,
    committed_in,
    delete_folder,
    new_generation,
    put_part,
    sha256,
)
from rm_robust.runs.storage.transfer import delete_file, delete_uncommitted, forget_uncommitted, pull_anew
from rm_robust.runs.storage.transfer import pull as refresh
from rm_robust.runs.storage.transfer import pull_files as refresh_records
from rm_robust.runs.storage.transfer import pull_folder as fetch
from rm_robust.runs.storage.transfer import put_file as persist
from rm_robust.runs.storage.transfer import written_by_any_node as _written_by_any_node

__all__ = [
    "Ranks",
    "StagingFolder",
    "begin",
    "commit",
    "commit_from_every_rank",
    "committed_folders",
    "delete",
    "delete_file",
    "fetch",
    "fetch_source",
    "filesystem_of",
    "forget_uncommitted",
    "full_name",
    "is_reachable",
    "locate",
    "persist",
    "read_only",
    "refresh",
    "refresh_records",
    "refuse_password",
    "release",
    "sha256",
    "shown",
    "storage_errors",
    "unreachable",
    "write_json",
    "write_text",
    "written_by_any_node",
]

Value = TypeVar("Value")


class Ranks(Protocol):
    """The processes that train together. All make the same calls in the same order."""

    @property
    def rank(self) -> int: ...

    def barrier(self) -> None:
        """Wait for every rank."""

    def gather(self, value: Value) -> list[Value]:
        """Return every rank's value, in rank order, on every rank."""


@dataclass(frozen=True)
class StagingFolder:
    """A folder that tasks on all nodes of a cluster write into."""

    path: str
    """Where the tasks write, as `filesystem` understands it."""
    filesystem: pafs.FileSystem | None
    """pyarrow's filesystem of `path`; None for paths of the operating system."""
    seen_by_all: Path | None
    """The folder that every node must see (`directory.require_shared`); None in an object store, where none is."""


def begin(run_dir: Path) -> None:
    """Begin or resume a run on this node: delete what was never committed, and fetch what is.

    Raises StorageError when the storage cannot be reached, CheckpointError when it holds other bytes than were
    committed.
    """
    delete_uncommitted(run_dir)
    pull_anew(run_dir)


def is_reachable(folder: Path) -> bool:
    """Return whether this node has the folder, or can fetch it because it lies in an object store."""
    return folder.is_dir() or uri_of(folder) is not None


def committed_folders(root: Path) -> list[str]:
    """Return the names of the committed folders in `root`, sorted.

    Raises StorageError when the storage cannot be reached.
    """
    if uri_of(root) is not None:
        return committed_in(root)
    if not root.is_dir():
        return []
    return sorted(entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def delete(folder: Path) -> None:
    """Delete a committed folder. Raises OSError when the storage does not allow it."""
    if uri_of(folder) is None:
        shutil.rmtree(folder)
    else:
        delete_folder(folder)


@contextmanager
def written_by_any_node(staged: Path, target: Path) -> Iterator[StagingFolder]:
    """Yield where the tasks of a Ray Data pipeline write; the files are in `staged` on this node when the body ends.

    `staged` lies in the folder that `commit` is about to make `target`.
    """
    with _written_by_any_node(staged, target) as (path, filesystem):
        yield StagingFolder(path, filesystem, staged.parent if filesystem is None else None)


def commit_from_every_rank(folder: Path, write: Callable[[Path], None], ranks: Ranks) -> None:
    """Make what every rank writes into the folder it is given one committed `folder`, whole or not at all.

    Every rank calls it, and returns after the commit. On a file system the ranks write into one shared folder, and rank
    0 commits it with a rename. Nothing is shared in an object store: every rank uploads what it wrote, and rank 0
    commits all of it as one. Raises StorageError when the storage takes no more; `folder` is then as it was.
    """
    is_shared = uri_of(folder) is None
    staging = folder.parent / (".staging" if is_shared else f".staging-{ranks.rank}")
    with storage_errors(folder.parent):
        if ranks.rank == 0 or not is_shared:
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir(parents=True)
        ranks.barrier()
        write(staging)
    ranks.barrier()
    if not is_shared:
        _commit_parts(staging, folder, ranks)
        return
    if ranks.rank == 0:
        commit(folder, lambda partial: _move_into(staging, partial))
    ranks.barrier()


def _commit_parts(staging: Path, folder: Path, ranks: Ranks) -> None:
    generation = ranks.gather(new_generation())[0]
    with storage_errors(folder):
        part: dict[str, StoredFile] = put_part(staging, folder, generation)
    parts = ranks.gather(part)
    if ranks.rank == 0:
        with storage_errors(folder):
            commit_generation(folder, generation, parts)
    ranks.barrier()
    shutil.rmtree(staging)


def _move_into(staging: Path, folder: Path) -> None:
    for entry in list(staging.iterdir()):
        entry.rename(folder / entry.name)
    staging.rmdir()


def full_name(path: str) -> str:
    """Return a data source as messages name it: a URI as it is, a path in full."""
    return path if is_uri(path) else str(Path(path).expanduser().absolute())


@functools.lru_cache(maxsize=64)
def fetch_source(path: str) -> None:
    """Fetch the data of a path that a run in an object store has committed, perhaps from another node.

    Each process does this once for a path, because committed data does not change. Data that a user names by a URI is
    not fetched: it is read where it lies.
    """
    if not is_uri(path):
        fetch(Path(path).expanduser().absolute())
