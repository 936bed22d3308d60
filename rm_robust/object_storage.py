"""A run directory in an object store (s3://, gs://, …). Every node works on a copy of its own; what counts is what the bucket holds.

    s3://bucket/runs/mine  <─put, pull─►  ~/.cache/rm_robust_object_storage/s3/bucket/runs/mine      the same path on every node

    a file                 one object, which a put replaces whole: stages/sft.json, metrics.jsonl
    a committed folder     <folder>/<generation>/<file>, and <folder>/.commit.json, which names the generation and the sizes and hashes of its files.
                           It is put last: a reader sees the former folder or the new one, whole. What an interrupted put leaves is in no generation
                           that is named, and goes with the next put.

The copy's path tells the URI, so the rest of the program handles paths, and all of this does nothing for a run directory on a file system. One
process at a time writes a run, as everywhere. `python -m rm_robust.object_storage s3://bucket/runs/mine/checkpoints/policy DIR` copies a committed
folder for programs that know nothing of this.
"""

import argparse
import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import sys
import uuid
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import pyarrow.fs as pafs

from rm_robust.errors import CheckpointError, DataError, RmRobustError
from rm_robust.filesystems import filesystem_of, is_uri, refuse_password

COPIES = "rm_robust_object_storage"
"""The part of a path below which scheme, bucket and key follow: so every node knows a copy for what it is, wherever it keeps its own."""
SCHEMES = ("s3", "gs", "abfs")
CACHE_VARIABLE = "RM_ROBUST_CACHE"
COMMIT = ".commit.json"
STATE = "state"
"""Folders of training states, by far the largest: they are pulled only by who names them."""
_UNCOMMITTED = "uncommitted-"
_CHUNK_BYTES = 8 * 2**20


@dataclass(frozen=True)
class StoredFile:
    """Of a committed folder."""

    num_bytes: int
    sha256: str


@dataclass(frozen=True)
class Commit:
    """What .commit.json says: the generation, and its files by their path below the folder."""

    generation: str
    files: dict[str, StoredFile]


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
    """The URI of which `path` is the copy; None for any other path."""
    parts = path.parts
    if COPIES not in parts:
        return None
    scheme, *rest = parts[parts.index(COPIES) + 1 :]
    return f"{scheme}://{'/'.join(rest)}"


def pull(path: Path) -> Path:
    """Bring this node's copy of `path`, and of what lies below it but training states, to what is committed; returns `path`.

    Raises OSError when the store cannot be reached, CheckpointError when it holds other bytes than were committed.
    """
    if uri_of(path) is None:
        return path
    filesystem, inner = _place(path)
    for folder in (path, *path.parents[: len(Path(inner).parts) - 1]):  # it may lie inside a committed folder, though not above the bucket
        if (commit := _read_commit(folder)) is not None:
            _fetch_folder(folder, commit)
            return path
    files = _files_below(filesystem, inner)
    folders = _committed_folders(path, files)
    for folder in folders:
        if STATE not in folder.relative_to(path).parts:
            commit = _read_commit(folder)
            assert commit is not None, f"{folder} was committed a moment ago"
            _fetch_folder(folder, commit)
    _fetch_loose_files(filesystem, path, files, folders)
    return path


def pull_files(path: Path) -> Path:
    """As `pull`, without any committed folder: the records and metrics of the runs below."""
    if uri_of(path) is not None:
        filesystem, inner = _place(path)
        files = _files_below(filesystem, inner)
        _fetch_loose_files(filesystem, path, files, _committed_folders(path, files))
    return path


def forget_uncommitted(run_dir: Path) -> None:
    """At the start of a run: what this node has beyond the store was never committed, and is deleted. Then as `pull_files`."""
    if uri_of(run_dir) is None:
        return
    files = _files_below(*_place(run_dir))
    folders = _committed_folders(run_dir, files)
    kept = {run_dir / key for key in files} | {_mark(folder) for folder in folders}
    for path in sorted(run_dir.rglob("*"), reverse=True):  # files before their folders
        if _is_in_a_folder(path, folders):
            continue
        if path.is_dir():
            with contextlib.suppress(OSError):  # it is not empty
                path.rmdir()
        elif path not in kept:
            path.unlink()
    pull_files(run_dir)


def require_writable(run_dir: Path) -> None:
    """Raises OSError where nothing can be written to the run directory."""
    probe = run_dir / f".writable-{os.getpid()}"
    probe.touch()
    put_file(probe)
    probe.unlink()
    if uri_of(probe) is not None:
        filesystem, inner = _place(probe)
        filesystem.delete_file(inner)


def put_file(path: Path) -> None:
    """After `path` was written: the object of which it is the copy. Raises OSError."""
    if uri_of(path) is None:
        return
    filesystem, inner = _place(path)
    _upload(filesystem, path, inner)
    stored = filesystem.get_file_info(inner)
    os.utime(path, ns=(stored.mtime_ns, stored.mtime_ns))  # so that a pull finds the two alike


def put_folder(written: Path, folder: Path) -> str | None:
    """Commit what was `written` as the `folder`; returns its generation, which `keep_generation` wants once the copy is that too. None for a folder that
    is no copy. Raises OSError."""
    if uri_of(folder) is None:
        return None
    _mark(folder).unlink(missing_ok=True)
    generation = new_generation()
    commit_generation(folder, generation, [put_part(written, folder, generation)])
    return generation


def keep_generation(folder: Path, generation: str | None) -> None:
    """The copy `folder` is now what was put under that generation: a pull has nothing to do."""
    if generation is not None:
        _mark(folder).write_text(generation)


def new_generation() -> str:
    return uuid.uuid4().hex


def put_part(written: Path, folder: Path, generation: str) -> dict[str, StoredFile]:
    """Upload files of a generation that several nodes write; nobody sees them before `commit_generation`."""
    filesystem, inner = _place(folder)
    found = {}
    for path in sorted(entry for entry in written.rglob("*") if entry.is_file()):
        key = path.relative_to(written).as_posix()
        _upload(filesystem, path, f"{inner}/{generation}/{key}")
        found[key] = StoredFile(path.stat().st_size, _sha256(path))
    return found


def commit_generation(folder: Path, generation: str, parts: Iterable[Mapping[str, StoredFile]]) -> None:
    """Make it what `folder` is, in one put; then delete the generations before it, and what interrupted puts have left."""
    filesystem, inner = _place(folder)
    files = {key: stored for part in parts for key, stored in part.items()}
    with filesystem.open_output_stream(f"{inner}/{COMMIT}") as stream:
        stream.write(json.dumps(asdict(Commit(generation, files))).encode())
    for entry in filesystem.get_file_info(pafs.FileSelector(inner)):
        if entry.type == pafs.FileType.Directory and entry.base_name != generation:
            filesystem.delete_dir(entry.path)


@contextlib.contextmanager
def written_by_any_node(folder: Path, target: Path) -> Iterator[tuple[str, pafs.FileSystem | None]]:
    """Where all nodes of a cluster can write files that are then in `folder`, here: `folder` itself, or a place beside `target` in its store."""
    if uri_of(target) is None:
        yield str(folder), None
        return
    filesystem, inner = _place(target)
    place = f"{inner}/{_UNCOMMITTED}{new_generation()}"
    try:
        yield place, filesystem
        for key, info in _files_below(filesystem, place).items():
            (folder / key).parent.mkdir(parents=True, exist_ok=True)
            _download(filesystem, info.path, folder / key)
    finally:
        with contextlib.suppress(FileNotFoundError):
            filesystem.delete_dir(place)


def committed_in(root: Path) -> list[str]:
    """Names of the committed folders in `root`, in the store. Raises OSError."""
    filesystem, inner = _place(root)
    names = [key.split("/") for key in _files_below(filesystem, inner)]
    return sorted(parts[0] for parts in names if parts[1:] == [COMMIT])


def delete_folder(folder: Path) -> None:
    """First what makes it one."""
    filesystem, inner = _place(folder)
    filesystem.delete_file(f"{inner}/{COMMIT}")
    filesystem.delete_dir(inner)
    shutil.rmtree(folder, ignore_errors=True)


def _place(path: Path) -> tuple[pafs.FileSystem, str]:
    """The filesystem of a copy's bucket, one for all that lies in it, and the key there."""
    uri = uri_of(path)
    assert uri is not None, f"{path} is no copy"
    scheme, _, rest = uri.partition("://")
    bucket, _, key = rest.partition("/")
    filesystem, root = filesystem_of(f"{scheme}://{bucket}")
    return filesystem, f"{root}/{key}".rstrip("/")


def _files_below(filesystem: pafs.FileSystem, inner: str) -> dict[str, pafs.FileInfo]:
    """By their path below."""
    entries = filesystem.get_file_info(pafs.FileSelector(inner, recursive=True, allow_not_found=True))
    return {entry.path.removeprefix(f"{inner}/"): entry for entry in entries if entry.type == pafs.FileType.File}


def _committed_folders(path: Path, files: Iterable[str]) -> list[Path]:
    return [path / key.removesuffix(COMMIT) for key in files if key.rpartition("/")[2] == COMMIT]


def _is_in_a_folder(path: Path, folders: list[Path]) -> bool:
    return any(folder == path or folder in path.parents for folder in folders)


def _read_commit(folder: Path) -> Commit | None:
    filesystem, inner = _place(folder)
    try:
        with filesystem.open_input_file(f"{inner}/{COMMIT}") as stream:
            content = json.loads(stream.read())
        return Commit(content["generation"], {key: StoredFile(**own) for key, own in content["files"].items()})
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{uri_of(folder)}/{COMMIT} is not what this program commits ({error!r}). Restore it, or delete the folder.") from error


def _fetch_folder(folder: Path, commit: Commit) -> None:
    """Unless this node has that generation."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _only_one(folder):
        if folder.is_dir() and _mark(folder).is_file() and _mark(folder).read_text() == commit.generation:
            return
        filesystem, inner = _place(folder)
        partial = folder.with_name(f".{folder.name}.partial-pull")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        for key, stored in commit.files.items():
            path = partial / key
            path.parent.mkdir(parents=True, exist_ok=True)
            _download(filesystem, f"{inner}/{commit.generation}/{key}", path)
            if (path.stat().st_size, _sha256(path)) != (stored.num_bytes, stored.sha256):
                raise CheckpointError(f"{uri_of(folder)}/{commit.generation}/{key} has other bytes than were committed. Restore the object, or commit again.")
        _mark(folder).unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
        keep_generation(folder, commit.generation)


def _fetch_loose_files(filesystem: pafs.FileSystem, path: Path, files: Mapping[str, pafs.FileInfo], folders: list[Path]) -> None:
    for key, info in files.items():
        if not _is_in_a_folder(path / key, folders) and _UNCOMMITTED not in key:
            _fetch_file(filesystem, info, path / key)


def _fetch_file(filesystem: pafs.FileSystem, info: pafs.FileInfo, path: Path) -> None:
    if path.is_file() and (path.stat().st_size, path.stat().st_mtime_ns) == (info.size, info.mtime_ns):
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.partial")
    _download(filesystem, info.path, partial)
    os.utime(partial, ns=(info.mtime_ns, info.mtime_ns))
    partial.replace(path)


def _upload(filesystem: pafs.FileSystem, path: Path, inner: str) -> None:
    """An object appears when its stream is closed, and not at all when it is not."""
    with path.open("rb") as source, filesystem.open_output_stream(inner) as stream:
        shutil.copyfileobj(source, stream, _CHUNK_BYTES)


def _download(filesystem: pafs.FileSystem, inner: str, path: Path) -> None:
    with filesystem.open_input_file(inner) as source, path.open("wb") as target:
        shutil.copyfileobj(source, target, _CHUNK_BYTES)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _mark(folder: Path) -> Path:
    """Which generation this node has."""
    return folder.with_name(f".{folder.name}.generation")


@contextlib.contextmanager
def _only_one(folder: Path) -> Iterator[None]:
    """Of this node's processes."""
    with folder.with_name(f".{folder.name}.pull-lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m rm_robust.object_storage", description="Copy a committed folder of a run out of an object store.")
    parser.add_argument("uri", help="s3://bucket/runs/mine/checkpoints/reward_model")
    parser.add_argument("folder", type=Path, help="a new folder")
    options = parser.parse_args(arguments)
    try:
        if not is_uri(options.uri) or _read_commit(local_path(options.uri)) is None:
            raise CheckpointError(f"{options.uri} is no committed folder in an object store.")
        shutil.copytree(pull(local_path(options.uri)), options.folder)
    except (RmRobustError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
