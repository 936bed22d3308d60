"""Bring a node's copy of a run to what the bucket holds (pull), and the bucket to what the node has written (put)."""

import contextlib
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path

import pyarrow.fs as pafs

from rm_robust.errors import CheckpointError
from rm_robust.runs.storage.copies import LOCK, LOG, PARTIAL, generation_mark, locked, object_of, reached, uri_of
from rm_robust.runs.storage.generations import (
    GENERATION,
    UNCOMMITTED,
    Commit,
    commit_generation,
    committed_folders,
    download,
    files_below,
    is_a_file,
    is_in_a_folder,
    new_generation,
    put_part,
    read_commit,
    sha256,
    write_object,
)

STATE = "state"
"""The name of the folders of training states. They are by far the largest, so only a caller that names one pulls it."""
NUM_READINGS = 5
"""Attempts at pulling a folder that is committed again while it is pulled."""


def pull(run_dir: Path) -> Path:
    """Bring this node's copy of a run, or of a part of one, to what is committed, and return its path.

    Training states are left out. Nothing happens for a run on a file system. Raises StorageError when the store cannot
    be reached, CheckpointError when it holds other bytes than were committed.
    """
    if uri_of(run_dir) is not None:
        with reached(run_dir):
            files = files_below(run_dir)
            for folder in committed_folders(run_dir, files):
                if STATE not in folder.relative_to(run_dir).parts:
                    fetch_folder(folder)
            _fetch_files(run_dir, files)
    return run_dir


def pull_anew(run_dir: Path) -> Path:
    """Delete what was never committed, and `pull`: for a node where a run begins or goes on."""
    forget_uncommitted(run_dir)
    return pull(run_dir)


def pull_folder(path: Path) -> Path:
    """Pull the committed folder that `path` is or lies in, and nothing else.

    Returns `path`, also where there is no such folder.
    """
    if uri_of(path) is not None:
        with reached(path):
            _, inner = object_of(path)
            for folder in (path, *path.parents[: len(Path(inner).parts) - 1]):  # not above the bucket
                if fetch_folder(folder):
                    break
    return path


def pull_files(path: Path) -> Path:
    """Pull the files below `path` that are in no committed folder: the records and metrics of runs. Returns `path`."""
    if uri_of(path) is not None:
        with reached(path):
            _fetch_files(path, files_below(path))
    return path


def forget_uncommitted(run_dir: Path) -> None:
    """Delete what this node's copy has and the store has not: it was never committed.

    For a node where a run begins, or goes on after a loss.
    """
    if uri_of(run_dir) is None:
        return
    with reached(run_dir):
        files = files_below(run_dir)
        folders = committed_folders(run_dir, files)
        kept = {run_dir / key for key in files if is_a_file(key)} | {generation_mark(folder) for folder in folders}
        for path in sorted(run_dir.rglob("*"), reverse=True):  # files before their folders
            if is_in_a_folder(path, folders) or path.name.endswith((LOCK, LOG)):
                continue
            if path.is_dir():
                with contextlib.suppress(OSError):  # it is not empty
                    path.rmdir()
            elif path not in kept:
                path.unlink(missing_ok=True)


def fetch_folder(folder: Path) -> bool:
    """Download a committed folder unless this node has its generation. Returns False where there is no such folder."""
    for reading in range(1, NUM_READINGS + 1):
        commit = read_commit(folder)
        if commit is None:
            return False
        folder.parent.mkdir(parents=True, exist_ok=True)
        with locked(folder):
            if (
                folder.is_dir()
                and generation_mark(folder).is_file()
                and generation_mark(folder).read_text() == commit.generation
            ):
                return True
            try:
                partial = _download_generation(folder, commit)
            except FileNotFoundError:
                if reading == NUM_READINGS or read_commit(folder) == commit:
                    raise
                continue  # a new commit has deleted the generation meanwhile
            generation_mark(folder).unlink(missing_ok=True)
            shutil.rmtree(folder, ignore_errors=True)
            partial.rename(folder)
            generation_mark(folder).write_text(commit.generation)
            return True
    raise AssertionError("the last reading returns or raises")


def _download_generation(folder: Path, commit: Commit) -> Path:
    """Download a generation into a folder beside `folder`, check every file, and return it."""
    filesystem, inner = object_of(folder)
    partial = folder.with_name(f".{folder.name}{PARTIAL}-pull")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    for key, stored in commit.files.items():
        path = partial / key
        path.parent.mkdir(parents=True, exist_ok=True)
        download(filesystem, f"{inner}/{commit.generation}/{key}", path)
        if (path.stat().st_size, sha256(path)) != (stored.num_bytes, stored.sha256):
            raise CheckpointError(
                f"{uri_of(folder)}/{commit.generation}/{key} has other bytes than were committed. Restore the object, "
                "or commit again."
            )
    return partial


def _fetch_files(path: Path, files: Mapping[str, pafs.FileInfo]) -> None:
    """Download the files that are in no committed folder, but for log lines."""
    filesystem, _ = object_of(path)
    for key, info in files.items():
        if is_a_file(key) and not key.endswith(LOG):
            _fetch_file(filesystem, info, path / key)


def _fetch_file(filesystem: pafs.FileSystem, info: pafs.FileInfo, path: Path) -> None:
    if path.is_file() and (path.stat().st_size, path.stat().st_mtime_ns) == (info.size, info.mtime_ns):
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}{PARTIAL}")
    download(filesystem, info.path, partial)
    os.utime(partial, ns=(info.mtime_ns, info.mtime_ns))
    partial.replace(path)


def put_file(path: Path) -> None:
    """Put a file that was written into the store, so that every node can read it. Raises StorageError.

    Nothing happens for a file on a file system.
    """
    if uri_of(path) is None:
        return
    with reached(path):
        filesystem, inner = object_of(path)
        write_object(filesystem, inner, path.read_bytes())
        stored = filesystem.get_file_info(inner)
        os.utime(path, ns=(stored.mtime_ns, stored.mtime_ns))  # a pull compares size and time


def delete_file(path: Path) -> None:
    """Delete a file, in the store too. A file that is not there is no error. Raises StorageError."""
    if uri_of(path) is not None:
        with reached(path), contextlib.suppress(FileNotFoundError):
            filesystem, inner = object_of(path)
            filesystem.delete_file(inner)
    path.unlink(missing_ok=True)


@contextlib.contextmanager
def put_folder(written: Path, folder: Path) -> Iterator[None]:
    """Commit the files below `written` as `folder`, in the store; the body then makes the copy the same. Raises
    OSError.

    No other process of this node pulls the folder meanwhile. On a file system the body alone is run.
    """
    if uri_of(folder) is None:
        yield
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        generation_mark(folder).unlink(missing_ok=True)
        generation = new_generation()
        commit_generation(folder, generation, [put_part(written, folder, generation)])
        yield
        generation_mark(folder).write_text(generation)


@contextlib.contextmanager
def written_by_any_node(folder: Path, target: Path) -> Iterator[tuple[str, pafs.FileSystem | None]]:
    """Yield where all nodes can write files that are in `folder` on this node when the body ends.

    That is `folder` itself on a file system, and a temporary place beside `target` in an object store.
    """
    if uri_of(target) is None:
        yield str(folder), None
        return
    filesystem, inner = object_of(target)
    name = UNCOMMITTED + uuid.uuid4().hex
    written = f"{inner}/{name}"
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield written, filesystem
        for key, info in files_below(target / name).items():
            path = folder / key
            path.parent.mkdir(parents=True, exist_ok=True)
            download(filesystem, info.path, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            filesystem.delete_dir(written)


def delete_uncommitted(run_dir: Path) -> None:
    """Delete, in the store, what interrupted uploads left where nothing has been committed. For the start of a run."""
    if uri_of(run_dir) is None:
        return
    with reached(run_dir):
        filesystem, inner = object_of(run_dir)
        files = files_below(run_dir)
        folders = committed_folders(run_dir, files)
        abandoned_keys = {
            key[: key.index(part)] + part
            for key in files
            for part in key.split("/")
            if part.startswith((GENERATION, UNCOMMITTED))
        }
        for key in sorted(abandoned_keys):
            if not is_in_a_folder(run_dir / key, folders):
                filesystem.delete_dir(f"{inner}/{key}")


def require_writable(run_dir: Path) -> None:
    """Raise OSError when nothing can be written to the run directory."""
    name = f".writable-{os.getpid()}"
    if uri_of(run_dir) is None:
        (run_dir / name).touch()
        (run_dir / name).unlink()
        return
    filesystem, inner = object_of(run_dir / name)
    write_object(filesystem, inner, b"")
    filesystem.delete_file(inner)
