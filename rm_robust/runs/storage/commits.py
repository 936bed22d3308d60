"""Commit files and folders so that a reader sees the old one or the new one, whole: write beside, sync, rename."""

import contextlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

from safetensors import SafetensorError

from rm_robust.errors import StorageError
from rm_robust.runs.storage.copies import shown
from rm_robust.runs.storage.transfer import put_file, put_folder

_STORAGE_SIGNS = ("inline_container.cc", "PytorchStreamWriter", "I/O error")
"""Signs, in the texts of torch's RuntimeError and of SafetensorError, that the storage took only a part of a write."""


def commit_directory(target: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill an empty folder beside `target`, and make it `target` in one rename: whole or not at all.

    One process at a time may write a target. An older `target` is moved aside just before the rename and deleted after
    it. A kill between these two renames leaves no `target`; the next commit then puts the older one back before it does
    anything else. In an object store the folder is committed there first. Raises StorageError when the folder cannot be
    written; `target` is then as it was.
    """
    with storage_errors(target):
        _commit_directory(target, write)


@contextlib.contextmanager
def storage_errors(target: Path) -> Iterator[None]:
    """Raise StorageError for what the operating system, torch and safetensors raise when `target` cannot be written."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        if not isinstance(error, OSError) and not any(sign in str(error) for sign in _STORAGE_SIGNS):
            raise
        reason = (
            error.strerror
            if isinstance(error, OSError) and error.strerror
            else f"{str(error).splitlines()[0].rstrip('.')} ({_free_bytes(target)})"
        )
        raise StorageError(
            f"{shown(target)} could not be written: {reason}. What was committed before is as it was. Make room, or "
            "mend the storage, and run the same command again."
        ) from error


def _free_bytes(path: Path) -> str:
    """Return how much room is left, which the errors of torch and safetensors do not say."""
    folder = next(parent for parent in path.parents if parent.exists())
    return f"{shutil.disk_usage(folder).free} bytes are free there"


def _commit_directory(target: Path, write: Callable[[Path], None]) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    replaced = target.parent / f".{target.name}.partial-replaced"
    if replaced.exists() and not target.exists():
        replaced.rename(target)
    for stale in target.parent.glob(f".{target.name}.partial-*"):
        shutil.rmtree(stale)
    partial = target.parent / f".{target.name}.partial-{uuid.uuid4().hex[:8]}"
    partial.mkdir()
    try:
        write(partial)
        for path in (*partial.rglob("*"), partial):
            _sync(path)
        with put_folder(partial, target):
            if target.exists():
                target.rename(replaced)
                partial.rename(target)
                shutil.rmtree(replaced)
            else:
                partial.rename(target)
            _sync(target.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)  # it takes the room that is missing
        raise


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json_atomic(path: Path, obj: object) -> None:
    """Write `obj` as indented JSON, as `write_text_atomic` does. Raises ValueError for NaN and infinity."""
    write_text_atomic(path, json.dumps(obj, indent=2, allow_nan=False, ensure_ascii=False) + "\n")


def write_text_atomic(path: Path, text: str) -> None:
    """Write a file beside, sync it and rename it, so that a reader sees the old file or the new one, never a part.

    A file of a run in an object store is then put there. Raises StorageError, naming the file, when it cannot be
    written; what was there is then as it was.
    """
    partial = path.with_name(f".{path.name}.partial")
    with storage_errors(path):
        try:
            with partial.open("w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        except OSError:
            partial.unlink(missing_ok=True)  # it takes the room that is missing
            raise
        _sync(path.parent)
    put_file(path)
