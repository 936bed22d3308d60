"""Where each node keeps its copy of a run in an object store (s3://, gs://, …), and which URI a copy stands for.

    s3://bucket/runs/mine  <─put, pull─►  ~/.cache/rm_robust_object_storage/s3/bucket/runs/mine   (same path everywhere)

The path of a copy contains its URI, so the rest of the program handles paths. This package does nothing for a run
directory on a file system. The bucket is the record (generations.py); a copy can be deleted at any time. One process at
a time writes a run.
"""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pyarrow.fs as pafs
from filelock import FileLock

from rm_robust.errors import DataError, StorageError
from rm_robust.runs.storage.filesystems import filesystem_of, is_uri, refuse_password

COPIES = "rm_robust_object_storage"
"""The folder in a copy's path after which scheme, bucket and key follow.

It tells every node that the path is a copy.
"""
SCHEMES = ("s3", "gs", "abfs")
CACHE_VARIABLE = "RM_ROBUST_CACHE"
LOCK = ".lock"
"""The ending of the lock file beside a copy."""
LOG = ".log"
"""The ending of a file of log lines, which the process that writes it puts into the store when it ends; nobody pulls
it."""
PARTIAL = ".partial"
"""A hidden file or folder beside a copy that is not complete has this in its name."""


def local_path(text: str) -> Path:
    """Return the path that `text` gives, or the path of this node's copy where `text` is a URI.

    Raises DataError for a URI that cannot hold a run. The store is not asked.
    """
    if not is_uri(text):
        return Path(text)
    refuse_password(text)
    scheme, _, rest = text.partition("://")
    if scheme not in SCHEMES or not rest.strip("/") or "?" in rest:
        raise DataError(
            f"{text} cannot hold a run. Give a path, or {' or '.join(f'{known}://' for known in SCHEMES)}, bucket and "
            "folder, without options: the endpoint and the credentials come from the environment (AWS_ENDPOINT_URL, "
            "AWS_DEFAULT_REGION, …)."
        )
    root = Path(os.environ.get(CACHE_VARIABLE, "~/.cache")).expanduser().absolute()
    return root / COPIES / scheme / rest.strip("/")


def uri_of(path: Path) -> str | None:
    """Return the URI that the copy `path` stands for; None for other paths, and for a partial folder beside a copy."""
    parts = path.parts
    if COPIES not in parts or any(part.startswith(".") and PARTIAL in part for part in parts):
        return None
    scheme, *rest = parts[parts.index(COPIES) + 1 :]
    return f"{scheme}://{'/'.join(rest)}"


def shown(path: Path) -> str:
    """Return the name of a path for messages: the URI that the user gave, or the path."""
    return uri_of(path) or str(path)


@contextlib.contextmanager
def reached(path: Path) -> Iterator[None]:
    """Raise StorageError for what the operating system and pyarrow raise when the store cannot be reached."""
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"{shown(path)} cannot be reached: {error}. What was committed is as it was. Check the address, the "
            "network and the credentials of this machine (they need to list, read, write and delete), and run the same "
            "command again."
        ) from error


def object_of(path: Path) -> tuple[pafs.FileSystem, str]:
    """Return the filesystem and the bucket/key in it of the object that the copy `path` stands for.

    All objects of a bucket share one filesystem object.
    """
    uri = uri_of(path)
    assert uri is not None, f"{path} is no copy"
    scheme, _, rest = uri.partition("://")
    bucket, _, key = rest.partition("/")
    filesystem, root = filesystem_of(f"{scheme}://{bucket}")
    return filesystem, f"{root}/{key}".rstrip("/")


@contextlib.contextmanager
def copies_of_ones_own() -> Iterator[None]:
    """Keep copies in a temporary folder, for a process that only reads runs.

    A run at work on this node shares the usual copies, and the reader would replace files that the run is using.
    """
    cache_before = os.environ.get(CACHE_VARIABLE)
    with tempfile.TemporaryDirectory(prefix="rm_robust") as folder:
        os.environ[CACHE_VARIABLE] = folder
        try:
            yield
        finally:
            del os.environ[CACHE_VARIABLE]
            os.environ |= {} if cache_before is None else {CACHE_VARIABLE: cache_before}


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a copy: one process of this node at a time works on it."""
    with FileLock(folder.with_name(f".{folder.name}{LOCK}")):
        yield


def generation_mark(folder: Path) -> Path:
    """Return the file that says which generation of the folder this node has."""
    return folder.with_name(f".{folder.name}.generation")


def delete_copy(folder: Path) -> None:
    """Delete this node's copy of a folder that it no longer needs. A folder that is no copy stays."""
    if uri_of(folder) is not None:
        generation_mark(folder).unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)
