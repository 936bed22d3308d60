"""A run directory in an object store (s3://, gs://, …): where each node's copy of it lies, and which URI a copy is of.

    s3://bucket/runs/mine  <─put, pull─►  ~/.cache/rm_robust_object_storage/s3/bucket/runs/mine      the same path on every node

The copy's path tells the URI, so the rest of the program handles paths, and this package does nothing for a run directory on a file system. What counts
is what the bucket holds (generations.py). One process at a time writes a run, as everywhere.
"""

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pyarrow.fs as pafs

from rm_robust.errors import DataError, StorageError
from rm_robust.runs.storage.filesystems import filesystem_of, is_uri, refuse_password

COPIES = "rm_robust_object_storage"
"""The part of a path below which scheme, bucket and key follow: so every node knows a copy for what it is."""
SCHEMES = ("s3", "gs", "abfs")
CACHE_VARIABLE = "RM_ROBUST_CACHE"
LOCK = ".lock"
PARTIAL = ".partial"


def local_path(text: str) -> Path:
    """A path as it is; the copy of what a URI names. Raises DataError for a URI of another kind, without asking anybody."""
    if not is_uri(text):
        return Path(text)
    refuse_password(text)
    scheme, _, rest = text.partition("://")
    if scheme not in SCHEMES or not rest.strip("/") or "?" in rest:
        raise DataError(
            f"{text} cannot hold a run. Give a path, or {' or '.join(f'{known}://' for known in SCHEMES)}, bucket and folder, without options: the endpoint "
            "and the credentials come from the environment (AWS_ENDPOINT_URL, AWS_DEFAULT_REGION, …)."
        )
    root = Path(os.environ.get(CACHE_VARIABLE, "~/.cache")).expanduser().absolute()
    return root / COPIES / scheme / rest.strip("/")


def uri_of(path: Path) -> str | None:
    """The URI of which `path` is the copy; None for any other path, and for what is still written beside one (checkpoint.py)."""
    parts = path.parts
    if COPIES not in parts or any(part.startswith(".") and PARTIAL in part for part in parts):
        return None
    scheme, *rest = parts[parts.index(COPIES) + 1 :]
    return f"{scheme}://{'/'.join(rest)}"


def shown(path: Path) -> str:
    """For messages: what the user knows it by."""
    return uri_of(path) or str(path)


@contextlib.contextmanager
def reached(path: Path) -> Iterator[None]:
    """StorageError for what the operating system and pyarrow raise."""
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"{shown(path)} cannot be reached: {error}. What was committed is as it was. Check the address, the network and the credentials of this machine "
            "(they need to list, read, write and delete), and run the same command again."
        ) from error


def place(path: Path) -> tuple[pafs.FileSystem, str]:
    """The filesystem of a copy's bucket, one for all that lies in it, and the key there."""
    uri = uri_of(path)
    assert uri is not None, f"{path} is no copy"
    scheme, _, rest = uri.partition("://")
    bucket, _, key = rest.partition("/")
    filesystem, root = filesystem_of(f"{scheme}://{bucket}")
    return filesystem, f"{root}/{key}".rstrip("/")


@contextlib.contextmanager
def copies_of_ones_own() -> Iterator[None]:
    """For who only looks: beside a run on the same node, its files would be replaced below its hands."""
    before = os.environ.get(CACHE_VARIABLE)
    with tempfile.TemporaryDirectory(prefix="rm_robust") as folder:
        os.environ[CACHE_VARIABLE] = folder
        try:
            yield
        finally:
            del os.environ[CACHE_VARIABLE]
            os.environ |= {} if before is None else {CACHE_VARIABLE: before}


@contextlib.contextmanager
def only_one(folder: Path) -> Iterator[None]:
    """Of this node's processes works on the copy."""
    with folder.with_name(f".{folder.name}{LOCK}").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def mark(folder: Path) -> Path:
    """Which generation this node has."""
    return folder.with_name(f".{folder.name}.generation")


def delete_copy(folder: Path) -> None:
    """Of a folder that is of no use here any more; nothing for a folder that is no copy."""
    if uri_of(folder) is not None:
        mark(folder).unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)
