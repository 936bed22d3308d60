"""A run directory in an object store (s3://, gs://, …). Every node works on a copy of its own; what counts is what the bucket holds.

    s3://bucket/runs/mine  <─put, pull─►  ~/.cache/rm_robust_object_storage/s3/bucket/runs/mine      the same path on every node

    a file                 one object, which a put replaces: stages/sft.json, metrics.jsonl
    a committed folder     <folder>/generation-<id>/<file>, and <folder>/.commit.json, which names the generation and the sizes and hashes of its files.
                           It is put last: a reader sees the former folder or the new one, whole. What an interrupted put leaves is in no generation
                           that is named: nobody pulls it, and it goes with the next put, or when the run starts again.

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
import tempfile
import uuid
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import pyarrow.fs as pafs

from rm_robust.errors import CheckpointError, DataError, RmRobustError, StorageError
from rm_robust.filesystems import filesystem_of, is_uri, refuse_password

COPIES = "rm_robust_object_storage"
"""The part of a path below which scheme, bucket and key follow: so every node knows a copy for what it is."""
SCHEMES = ("s3", "gs", "abfs")
CACHE_VARIABLE = "RM_ROBUST_CACHE"
COMMIT = ".commit.json"
STATE = "state"
"""Folders of training states, by far the largest: they are pulled only by who names them."""
GENERATION, UNCOMMITTED = "generation-", "uncommitted-"
"""How the parts of a key begin below which nothing is a file by itself."""
LOCK = ".pull-lock"
PARTIAL = ".partial"
NUM_READINGS = 5
"""Of a folder that is committed again and again while it is pulled."""
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


def pull(run_dir: Path) -> Path:
    """Bring this node's copy of a run, or of a part of one, to what is committed, but for training states; returns it.

    Raises StorageError when the store cannot be reached, CheckpointError when it holds other bytes than were committed.
    """
    if uri_of(run_dir) is not None:
        with reached(run_dir):
            files = _files_below(run_dir)
            for folder in _committed_folders(run_dir, files):
                if STATE not in folder.relative_to(run_dir).parts:
                    _fetch_folder(folder)
            _fetch_files(run_dir, files)
    return run_dir


def pull_folder(path: Path) -> Path:
    """As `pull`, of the committed folder that `path` is or lies in, and of that alone; nothing where there is none."""
    if uri_of(path) is not None:
        with reached(path):
            _, inner = _place(path)
            for folder in (path, *path.parents[: len(Path(inner).parts) - 1]):  # not above the bucket
                if _fetch_folder(folder):
                    break
    return path


def pull_files(path: Path) -> Path:
    """As `pull`, without any committed folder: the records and metrics of the runs below."""
    if uri_of(path) is not None:
        with reached(path):
            _fetch_files(path, _files_below(path))
    return path


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


def forget_uncommitted(run_dir: Path) -> None:
    """On a node where a run begins, or goes on after a loss: what its copy has beyond the store was never committed, and is deleted."""
    if uri_of(run_dir) is None:
        return
    with reached(run_dir):
        files = _files_below(run_dir)
        folders = _committed_folders(run_dir, files)
        kept = {run_dir / key for key in files if _is_a_file(key)} | {_mark(folder) for folder in folders}
        for path in sorted(run_dir.rglob("*"), reverse=True):  # files before their folders
            if _is_in_a_folder(path, folders) or path.name.endswith(LOCK):
                continue
            if path.is_dir():
                with contextlib.suppress(OSError):  # it is not empty
                    path.rmdir()
            elif path not in kept:
                path.unlink(missing_ok=True)


def delete_uncommitted(run_dir: Path) -> None:
    """In the store, at the start of a run: what interrupted puts have left where nothing was committed before them."""
    if uri_of(run_dir) is None:
        return
    with reached(run_dir):
        filesystem, inner = _place(run_dir)
        files = _files_below(run_dir)
        folders = _committed_folders(run_dir, files)
        left = {key[: key.index(part)] + part for key in files for part in key.split("/") if part.startswith((GENERATION, UNCOMMITTED))}
        for key in sorted(left):
            if not _is_in_a_folder(run_dir / key, folders):
                filesystem.delete_dir(f"{inner}/{key}")


def names_in(run_dir: Path) -> set[str]:
    """What the run directory holds, at its top. Raises OSError."""
    if uri_of(run_dir) is None:
        return {entry.name for entry in run_dir.iterdir()}
    return {key.split("/")[0] for key in _files_below(run_dir)}


def read_text(path: Path) -> str:
    """Of a file of the run, without touching the copy. Raises OSError."""
    if uri_of(path) is None:
        return path.read_text()
    filesystem, inner = _place(path)
    with filesystem.open_input_file(inner) as stream:
        return bytes(stream.read()).decode()


def require_writable(run_dir: Path) -> None:
    """Raises OSError where nothing can be written to the run directory."""
    name = f".writable-{os.getpid()}"
    if uri_of(run_dir) is None:
        (run_dir / name).touch()
        (run_dir / name).unlink()
        return
    filesystem, inner = _place(run_dir / name)
    _write(filesystem, inner, b"")
    filesystem.delete_file(inner)


def put_file(path: Path) -> None:
    """After `path` was written: the object of which it is the copy. Raises StorageError."""
    if uri_of(path) is None:
        return
    with reached(path):
        filesystem, inner = _place(path)
        _write(filesystem, inner, path.read_bytes())
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
        _mark(folder).unlink(missing_ok=True)
        generation = new_generation()
        commit_generation(folder, generation, [put_part(written, folder, generation)])
        yield
        _mark(folder).write_text(generation)


def new_generation() -> str:
    return GENERATION + uuid.uuid4().hex


def put_part(written: Path, folder: Path, generation: str) -> dict[str, StoredFile]:
    """Upload files of a generation, which several processes may write parts of; nobody sees them before `commit_generation`."""
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
    _write(filesystem, f"{inner}/{COMMIT}", json.dumps(asdict(Commit(generation, files))).encode())
    with contextlib.suppress(OSError):  # committed it is; what stays goes with the next put
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
    place = f"{inner}/{UNCOMMITTED}{uuid.uuid4().hex}"
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield place, filesystem
        for entry in filesystem.get_file_info(pafs.FileSelector(place, recursive=True, allow_not_found=True)):
            if entry.type == pafs.FileType.File:
                path = folder / entry.path.removeprefix(f"{place}/")
                path.parent.mkdir(parents=True, exist_ok=True)
                _download(filesystem, entry.path, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            filesystem.delete_dir(place)


def committed_in(root: Path) -> list[str]:
    """Names of the committed folders in `root`, in the store. Raises StorageError."""
    with reached(root):
        names = [key.split("/") for key in _files_below(root)]
    return sorted(parts[0] for parts in names if parts[1:] == [COMMIT])


def delete_folder(folder: Path) -> None:
    """In the store, first what makes it one; then the copy. Raises OSError."""
    filesystem, inner = _place(folder)
    filesystem.delete_file(f"{inner}/{COMMIT}")
    filesystem.delete_dir(inner)
    delete_copy(folder)


def delete_copy(folder: Path) -> None:
    """Of a folder that is of no use here any more; nothing for a folder that is no copy."""
    if uri_of(folder) is not None:
        _mark(folder).unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def only_one(folder: Path) -> Iterator[None]:
    """Of this node's processes works on the copy."""
    with folder.with_name(f".{folder.name}{LOCK}").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _place(path: Path) -> tuple[pafs.FileSystem, str]:
    """The filesystem of a copy's bucket, one for all that lies in it, and the key there."""
    uri = uri_of(path)
    assert uri is not None, f"{path} is no copy"
    scheme, _, rest = uri.partition("://")
    bucket, _, key = rest.partition("/")
    filesystem, root = filesystem_of(f"{scheme}://{bucket}")
    return filesystem, f"{root}/{key}".rstrip("/")


def _files_below(path: Path) -> dict[str, pafs.FileInfo]:
    """Objects by their key below `path`."""
    filesystem, inner = _place(path)
    entries = filesystem.get_file_info(pafs.FileSelector(inner, recursive=True, allow_not_found=True))
    return {entry.path.removeprefix(f"{inner}/"): entry for entry in entries if entry.type == pafs.FileType.File}


def _committed_folders(path: Path, files: Iterable[str]) -> list[Path]:
    return [path / key.removesuffix(COMMIT) for key in files if key.rpartition("/")[2] == COMMIT]


def _is_in_a_folder(path: Path, folders: list[Path]) -> bool:
    return any(folder == path or folder in path.parents for folder in folders)


def _is_a_file(key: str) -> bool:
    """By itself: of no folder, committed or not."""
    return not any(part.startswith((GENERATION, UNCOMMITTED)) or part == COMMIT for part in key.split("/"))


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


def _fetch_folder(folder: Path) -> bool:
    """Unless this node has its generation. False where there is no such committed folder."""
    for reading in range(1, NUM_READINGS + 1):
        commit = _read_commit(folder)
        if commit is None:
            return False
        folder.parent.mkdir(parents=True, exist_ok=True)
        with only_one(folder):
            if folder.is_dir() and _mark(folder).is_file() and _mark(folder).read_text() == commit.generation:
                return True
            try:
                partial = _download_generation(folder, commit)
            except FileNotFoundError:
                if reading == NUM_READINGS or _read_commit(folder) == commit:
                    raise
                continue  # it was committed anew meanwhile, and the former generation is gone
            _mark(folder).unlink(missing_ok=True)
            shutil.rmtree(folder, ignore_errors=True)
            partial.rename(folder)
            _mark(folder).write_text(commit.generation)
            return True
    raise AssertionError("the last reading returns or raises")


def _download_generation(folder: Path, commit: Commit) -> Path:
    """Into a folder beside, every file checked."""
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
    return partial


def _fetch_files(path: Path, files: Mapping[str, pafs.FileInfo]) -> None:
    """Those that are of no folder."""
    filesystem, _ = _place(path)
    for key, info in files.items():
        if _is_a_file(key):
            _fetch_file(filesystem, info, path / key)


def _fetch_file(filesystem: pafs.FileSystem, info: pafs.FileInfo, path: Path) -> None:
    if path.is_file() and (path.stat().st_size, path.stat().st_mtime_ns) == (info.size, info.mtime_ns):
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.partial")
    _download(filesystem, info.path, partial)
    os.utime(partial, ns=(info.mtime_ns, info.mtime_ns))
    partial.replace(path)


def _write(filesystem: pafs.FileSystem, inner: str, content: bytes) -> None:
    """One object, in one call: pyarrow has no way to give a half-written stream up, and closes it also on the way out of an exception."""
    with filesystem.open_output_stream(inner) as stream:
        stream.write(content)


def _upload(filesystem: pafs.FileSystem, path: Path, inner: str) -> None:
    """A file of a generation, of any size; half of one is no harm there."""
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


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m rm_robust.object_storage", description="Copy a committed folder of a run out of an object store.")
    parser.add_argument("uri", help="s3://bucket/runs/mine/checkpoints/reward_model")
    parser.add_argument("folder", type=Path, help="a new folder")
    options = parser.parse_args(arguments)
    try:
        with copies_of_ones_own():
            copy = local_path(options.uri)
            with reached(copy):
                if uri_of(copy) is None or not _fetch_folder(copy):
                    raise CheckpointError(f"{options.uri} is no committed folder in an object store.")
            shutil.copytree(copy, options.folder)
    except (RmRobustError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
