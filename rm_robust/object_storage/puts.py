"""Bring a bucket to what a node has written: files, and folders that are committed whole."""

import contextlib
import os
import uuid
from collections.abc import Iterator
from pathlib import Path

import pyarrow.fs as pafs

from rm_robust.object_storage.copies import mark, only_one, place, reached, uri_of
from rm_robust.object_storage.generations import (
    GENERATION,
    UNCOMMITTED,
    commit_generation,
    committed_folders,
    download,
    files_below,
    is_in_a_folder,
    new_generation,
    put_part,
    write_object,
)


def put_file(path: Path) -> None:
    """After `path` was written: the object of which it is the copy. Raises StorageError."""
    if uri_of(path) is None:
        return
    with reached(path):
        filesystem, inner = place(path)
        write_object(filesystem, inner, path.read_bytes())
        stored = filesystem.get_file_info(inner)
        os.utime(path, ns=(stored.mtime_ns, stored.mtime_ns))  # so that a pull finds the two alike


@contextlib.contextmanager
def put_folder(written: Path, folder: Path) -> Iterator[None]:
    """Commit what was `written` as the `folder`; the body makes the copy that too, while no other process of this node pulls it. Raises OSError."""
    if uri_of(folder) is None:
        yield
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with only_one(folder):
        mark(folder).unlink(missing_ok=True)
        generation = new_generation()
        commit_generation(folder, generation, [put_part(written, folder, generation)])
        yield
        mark(folder).write_text(generation)


@contextlib.contextmanager
def written_by_any_node(folder: Path, target: Path) -> Iterator[tuple[str, pafs.FileSystem | None]]:
    """Where all nodes of a cluster can write files that are then in `folder`, here: `folder` itself, or a place beside `target` in its store."""
    if uri_of(target) is None:
        yield str(folder), None
        return
    filesystem, inner = place(target)
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
    """In the store, at the start of a run: what interrupted puts have left where nothing was committed before them."""
    if uri_of(run_dir) is None:
        return
    with reached(run_dir):
        filesystem, inner = place(run_dir)
        files = files_below(run_dir)
        folders = committed_folders(run_dir, files)
        left = {key[: key.index(part)] + part for key in files for part in key.split("/") if part.startswith((GENERATION, UNCOMMITTED))}
        for key in sorted(left):
            if not is_in_a_folder(run_dir / key, folders):
                filesystem.delete_dir(f"{inner}/{key}")


def require_writable(run_dir: Path) -> None:
    """Raises OSError where nothing can be written to the run directory."""
    name = f".writable-{os.getpid()}"
    if uri_of(run_dir) is None:
        (run_dir / name).touch()
        (run_dir / name).unlink()
        return
    filesystem, inner = place(run_dir / name)
    write_object(filesystem, inner, b"")
    filesystem.delete_file(inner)
