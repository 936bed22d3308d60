"""What a run's part of a bucket holds.

a file                 one object, which a put replaces: stages/sft.json, metrics.jsonl
a committed folder     <folder>/generation-<id>/<file>, and <folder>/.commit.json, which names the generation and the
                       sizes and hashes of its files

.commit.json is put last, so a reader sees the former folder or the new one, whole. An interrupted put leaves files of a
generation that nothing names. Nobody pulls them, and the next commit of the folder, or the next start of the run,
deletes them.
"""

import contextlib
import hashlib
import json
import re
import shutil
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import pyarrow.fs as pafs

from rm_robust.errors import CheckpointError, StorageError
from rm_robust.runs.storage.copies import delete_copy, object_of, reached, uri_of

COMMIT = ".commit.json"
GENERATION, UNCOMMITTED = "generation-", "uncommitted-"
"""Prefixes of the folders in a key whose files do not count by themselves."""
_NAME = re.compile(GENERATION + "[0-9a-f]{32}")
_CHUNK_BYTES = 8 * 2**20


@dataclass(frozen=True)
class StoredFile:
    """One file of a committed folder, as it was uploaded."""

    num_bytes: int
    sha256: str


@dataclass(frozen=True)
class Commit:
    """The content of .commit.json: the generation, and its files by their path below the folder."""

    generation: str
    files: dict[str, StoredFile]


def new_generation() -> str:
    """Return the name of a generation that nobody else uses."""
    return GENERATION + uuid.uuid4().hex


def put_part(written: Path, folder: Path, generation: str) -> dict[str, StoredFile]:
    """Upload the files below `written` as a part of a generation, and return them by their key.

    Several processes may upload parts of one generation. Nobody sees them before `commit_generation`.
    """
    filesystem, inner = object_of(folder)
    uploaded = {}
    for path in sorted(entry for entry in written.rglob("*") if entry.is_file()):
        key = path.relative_to(written).as_posix()
        _upload(filesystem, path, f"{inner}/{generation}/{key}")
        uploaded[key] = StoredFile(path.stat().st_size, sha256(path))
    return uploaded


def commit_generation(folder: Path, generation: str, parts: Iterable[Mapping[str, StoredFile]]) -> None:
    """Make the generation the content of `folder` in one put, then delete all other generations and interrupted
    uploads.

    Raises StorageError when the store does not hold what was uploaded: another writer of the run took the upload for an
    interrupted one and deleted it.
    """
    filesystem, inner = object_of(folder)
    files = {key: stored for part in parts for key, stored in part.items()}
    sizes_in_store = {key: info.size for key, info in files_below(folder / generation).items()}
    uploaded = {key: stored.num_bytes for key, stored in files.items()}
    if sizes_in_store != uploaded:
        changed = sorted(key for key, _ in sizes_in_store.items() ^ uploaded.items())
        raise StorageError(
            f"{uri_of(folder)} was not committed: {changed[0]}, of {len(uploaded)} files uploaded to {generation}, is "
            "gone from the store or of another size. Another process writes this run: let one of them go on. What was "
            "committed is whole."
        )
    write_object(filesystem, f"{inner}/{COMMIT}", json.dumps(asdict(Commit(generation, files))).encode())
    with contextlib.suppress(OSError):  # the commit holds; the next one deletes what stays
        for entry in filesystem.get_file_info(pafs.FileSelector(inner)):
            if entry.type == pafs.FileType.Directory and entry.base_name != generation:
                filesystem.delete_dir(entry.path)


def read_commit(folder: Path) -> Commit | None:
    """Return what the store says of a committed folder; None where there is none.

    Raises CheckpointError for a broken one.
    """
    filesystem, inner = object_of(folder)
    try:
        with filesystem.open_input_file(f"{inner}/{COMMIT}") as stream:
            content = json.loads(stream.read())
        commit = Commit(content["generation"], {key: StoredFile(**stored) for key, stored in content["files"].items()})
        outside = [key for key in commit.files if not stays_below(key)]
        if outside or not _NAME.fullmatch(commit.generation):
            raise ValueError(f"it names {[*outside, commit.generation][0]!r}")
        return commit
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{uri_of(folder)}/{COMMIT} is not what this program commits ({error!r}). Restore it, or delete the folder."
        ) from error


def committed_in(root: Path) -> list[str]:
    """Return the names of the committed folders in `root`, in the store, sorted. Raises StorageError."""
    with reached(root):
        names = [key.split("/") for key in files_below(root)]
    return sorted(parts[0] for parts in names if parts[1:] == [COMMIT])


def delete_folder(folder: Path) -> None:
    """Delete a committed folder in the store, its .commit.json first, and then the copy. Raises OSError."""
    filesystem, inner = object_of(folder)
    filesystem.delete_file(f"{inner}/{COMMIT}")
    filesystem.delete_dir(inner)
    delete_copy(folder)


def files_below(path: Path) -> dict[str, pafs.FileInfo]:
    """Return the objects below `path` by their key. Raises CheckpointError for a key that leads out of the folder."""
    filesystem, inner = object_of(path)
    entries = filesystem.get_file_info(pafs.FileSelector(inner, recursive=True, allow_not_found=True))
    files = {entry.path.removeprefix(f"{inner}/"): entry for entry in entries if entry.type == pafs.FileType.File}
    for key in files:
        if not stays_below(key):
            raise CheckpointError(
                f"{uri_of(path)} holds the object {key!r}, which could be a file outside of it on a node. Delete it, "
                "and see who wrote it."
            )
    return files


def stays_below(key: str) -> bool:
    """Return whether the path that a key becomes lies below the folder that the key is joined to."""
    return not {"", ".", ".."} & set(key.split("/")) and "\\" not in key and "\0" not in key


def committed_folders(path: Path, files: Iterable[str]) -> list[Path]:
    """Return the committed folders below `path`, given the keys below it."""
    return [path / key.removesuffix(COMMIT) for key in files if key.rpartition("/")[2] == COMMIT]


def is_in_a_folder(path: Path, folders: list[Path]) -> bool:
    """Return whether the path is one of the folders or lies in one."""
    return any(folder == path or folder in path.parents for folder in folders)


def is_a_file(key: str) -> bool:
    """Return whether the object is a file by itself, and not of a folder, committed or not."""
    return not any(part.startswith((GENERATION, UNCOMMITTED)) or part == COMMIT for part in key.split("/"))


def names_in(run_dir: Path) -> set[str]:
    """Return the names at the top of the run directory. Raises OSError."""
    if uri_of(run_dir) is None:
        return {entry.name for entry in run_dir.iterdir()}
    return {key.split("/")[0] for key in files_below(run_dir)}


def read_text(path: Path) -> str:
    """Return the text of a file of the run, without touching this node's copy. Raises OSError."""
    if uri_of(path) is None:
        return path.read_text()
    filesystem, inner = object_of(path)
    with filesystem.open_input_file(inner) as stream:
        return bytes(stream.read()).decode()


def write_object(filesystem: pafs.FileSystem, inner: str, content: bytes) -> None:
    """Write one object in one call.

    pyarrow cannot abandon a half-written stream: it closes, and so commits, the stream even when an exception leaves
    the block.
    """
    with filesystem.open_output_stream(inner) as stream:
        stream.write(content)


def download(filesystem: pafs.FileSystem, inner: str, path: Path) -> None:
    """Copy one object into a file, in pieces."""
    with filesystem.open_input_file(inner) as source, path.open("wb") as target:
        shutil.copyfileobj(source, target, _CHUNK_BYTES)


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _upload(filesystem: pafs.FileSystem, path: Path, inner: str) -> None:
    """Upload a file of a generation in pieces. Half an upload does no harm there, because nothing names it."""
    with path.open("rb") as source, filesystem.open_output_stream(inner) as stream:
        shutil.copyfileobj(source, stream, _CHUNK_BYTES)
