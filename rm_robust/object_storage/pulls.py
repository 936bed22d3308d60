"""Bring a node's copy of a run to what its bucket holds."""

import contextlib
import os
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path

import pyarrow.fs as pafs

from rm_robust.errors import CheckpointError
from rm_robust.object_storage.copies import LOCK, PARTIAL, mark, only_one, place, reached, uri_of
from rm_robust.object_storage.generations import Commit, committed_folders, download, files_below, is_a_file, is_in_a_folder, read_commit, sha256

STATE = "state"
"""Folders of training states, by far the largest: they are pulled only by who names them."""
NUM_READINGS = 5
"""Of a folder that is committed again and again while it is pulled."""


def pull(run_dir: Path) -> Path:
    """Bring this node's copy of a run, or of a part of one, to what is committed, but for training states; returns it.

    Raises StorageError when the store cannot be reached, CheckpointError when it holds other bytes than were committed.
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
    """As `pull`, where a run begins or goes on: what was never committed is gone after it."""
    forget_uncommitted(run_dir)
    return pull(run_dir)


def pull_folder(path: Path) -> Path:
    """As `pull`, of the committed folder that `path` is or lies in, and of that alone; nothing where there is none."""
    if uri_of(path) is not None:
        with reached(path):
            _, inner = place(path)
            for folder in (path, *path.parents[: len(Path(inner).parts) - 1]):  # not above the bucket
                if fetch_folder(folder):
                    break
    return path


def pull_files(path: Path) -> Path:
    """As `pull`, without any committed folder: the records and metrics of the runs below."""
    if uri_of(path) is not None:
        with reached(path):
            _fetch_files(path, files_below(path))
    return path


def forget_uncommitted(run_dir: Path) -> None:
    """On a node where a run begins, or goes on after a loss: what its copy has beyond the store was never committed, and is deleted."""
    if uri_of(run_dir) is None:
        return
    with reached(run_dir):
        files = files_below(run_dir)
        folders = committed_folders(run_dir, files)
        kept = {run_dir / key for key in files if is_a_file(key)} | {mark(folder) for folder in folders}
        for path in sorted(run_dir.rglob("*"), reverse=True):  # files before their folders
            if is_in_a_folder(path, folders) or path.name.endswith(LOCK):
                continue
            if path.is_dir():
                with contextlib.suppress(OSError):  # it is not empty
                    path.rmdir()
            elif path not in kept:
                path.unlink(missing_ok=True)


def fetch_folder(folder: Path) -> bool:
    """Unless this node has its generation. False where there is no such committed folder."""
    for reading in range(1, NUM_READINGS + 1):
        commit = read_commit(folder)
        if commit is None:
            return False
        folder.parent.mkdir(parents=True, exist_ok=True)
        with only_one(folder):
            if folder.is_dir() and mark(folder).is_file() and mark(folder).read_text() == commit.generation:
                return True
            try:
                partial = _download_generation(folder, commit)
            except FileNotFoundError:
                if reading == NUM_READINGS or read_commit(folder) == commit:
                    raise
                continue  # it was committed anew meanwhile, and the former generation is gone
            mark(folder).unlink(missing_ok=True)
            shutil.rmtree(folder, ignore_errors=True)
            partial.rename(folder)
            mark(folder).write_text(commit.generation)
            return True
    raise AssertionError("the last reading returns or raises")


def _download_generation(folder: Path, commit: Commit) -> Path:
    """Into a folder beside, every file checked."""
    filesystem, inner = place(folder)
    partial = folder.with_name(f".{folder.name}{PARTIAL}-pull")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    for key, stored in commit.files.items():
        path = partial / key
        path.parent.mkdir(parents=True, exist_ok=True)
        download(filesystem, f"{inner}/{commit.generation}/{key}", path)
        if (path.stat().st_size, sha256(path)) != (stored.num_bytes, stored.sha256):
            raise CheckpointError(f"{uri_of(folder)}/{commit.generation}/{key} has other bytes than were committed. Restore the object, or commit again.")
    return partial


def _fetch_files(path: Path, files: Mapping[str, pafs.FileInfo]) -> None:
    """Those that are of no folder."""
    filesystem, _ = place(path)
    for key, info in files.items():
        if is_a_file(key):
            _fetch_file(filesystem, info, path / key)


def _fetch_file(filesystem: pafs.FileSystem, info: pafs.FileInfo, path: Path) -> None:
    if path.is_file() and (path.stat().st_size, path.stat().st_mtime_ns) == (info.size, info.mtime_ns):
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}{PARTIAL}")
    download(filesystem, info.path, partial)
    os.utime(partial, ns=(info.mtime_ns, info.mtime_ns))
    partial.replace(path)
