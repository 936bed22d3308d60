"""What a run's part of a bucket holds.

a file                 one object, which a put replaces: stages/sft.json, metrics.jsonl
a committed folder     <folder>/generation-<id>/<file>, and <folder>/.commit.json, which names the generation and the sizes and hashes of its files.
                       It is put last: a reader sees the former folder or the new one, whole. What an interrupted put leaves is in no generation
                       that is named: nobody pulls it, and it goes with the next put, or when the run starts again.
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
from rm_robust.runs.storage.copies import delete_copy, place, reached, uri_of

COMMIT = ".commit.json"
GENERATION, UNCOMMITTED = "generation-", "uncommitted-"
"""How the parts of a key begin below which nothing is a file by itself."""
_NAME = re.compile(GENERATION + "[0-9a-f]{32}")
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


def new_generation() -> str:
    return GENERATION + uuid.uuid4().hex


def put_part(written: Path, folder: Path, generation: str) -> dict[str, StoredFile]:
    """Upload files of a generation, which several processes may write parts of; nobody sees them before `commit_generation`."""
    filesystem, inner = place(folder)
    found = {}
    for path in sorted(entry for entry in written.rglob("*") if entry.is_file()):
        key = path.relative_to(written).as_posix()
        _upload(filesystem, path, f"{inner}/{generation}/{key}")
        found[key] = StoredFile(path.stat().st_size, sha256(path))
    return found


def commit_generation(folder: Path, generation: str, parts: Iterable[Mapping[str, StoredFile]]) -> None:
    """Make it what `folder` is, in one put; then delete the generations before it, and what interrupted puts have left.

    Raises StorageError where the store has not what was uploaded: to another writer of the run it was the rest of an interrupted put.
    """
    filesystem, inner = place(folder)
    files = {key: stored for part in parts for key, stored in part.items()}
    found = {key: info.size for key, info in files_below(folder / generation).items()}
    uploaded = {key: stored.num_bytes for key, stored in files.items()}
    if found != uploaded:
        changed = sorted(key for key, _ in found.items() ^ uploaded.items())
        raise StorageError(
            f"{uri_of(folder)} was not committed: {changed[0]}, of {len(uploaded)} files uploaded to {generation}, is gone from the store or of another size. "
            "Another process writes this run: let one of them go on. What was committed is whole."
        )
    write_object(filesystem, f"{inner}/{COMMIT}", json.dumps(asdict(Commit(generation, files))).encode())
    with contextlib.suppress(OSError):  # committed it is; what stays goes with the next put
        for entry in filesystem.get_file_info(pafs.FileSelector(inner)):
            if entry.type == pafs.FileType.Directory and entry.base_name != generation:
                filesystem.delete_dir(entry.path)


def read_commit(folder: Path) -> Commit | None:
    filesystem, inner = place(folder)
    try:
        with filesystem.open_input_file(f"{inner}/{COMMIT}") as stream:
            content = json.loads(stream.read())
        commit = Commit(content["generation"], {key: StoredFile(**own) for key, own in content["files"].items()})
        wrong = [key for key in commit.files if not stays_below(key)]
        if wrong or not _NAME.fullmatch(commit.generation):
            raise ValueError(f"it names {[*wrong, commit.generation][0]!r}")
        return commit
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{uri_of(folder)}/{COMMIT} is not what this program commits ({error!r}). Restore it, or delete the folder."
        ) from error


def committed_in(root: Path) -> list[str]:
    """Names of the committed folders in `root`, in the store. Raises StorageError."""
    with reached(root):
        names = [key.split("/") for key in files_below(root)]
    return sorted(parts[0] for parts in names if parts[1:] == [COMMIT])


def delete_folder(folder: Path) -> None:
    """In the store, first what makes it one; then the copy. Raises OSError."""
    filesystem, inner = place(folder)
    filesystem.delete_file(f"{inner}/{COMMIT}")
    filesystem.delete_dir(inner)
    delete_copy(folder)


def files_below(path: Path) -> dict[str, pafs.FileInfo]:
    """Objects by their key below `path`. Raises CheckpointError for a key that would be a file elsewhere."""
    filesystem, inner = place(path)
    entries = filesystem.get_file_info(pafs.FileSelector(inner, recursive=True, allow_not_found=True))
    files = {entry.path.removeprefix(f"{inner}/"): entry for entry in entries if entry.type == pafs.FileType.File}
    for key in files:
        if not stays_below(key):
            raise CheckpointError(
                f"{uri_of(path)} holds the object {key!r}, which could be a file outside of it on a node. Delete it, and see who wrote it."
            )
    return files


def stays_below(key: str) -> bool:
    """The path that a key from a bucket becomes lies below the folder that it is joined to."""
    return not {"", ".", ".."} & set(key.split("/")) and "\\" not in key and "\0" not in key


def committed_folders(path: Path, files: Iterable[str]) -> list[Path]:
    return [path / key.removesuffix(COMMIT) for key in files if key.rpartition("/")[2] == COMMIT]


def is_in_a_folder(path: Path, folders: list[Path]) -> bool:
    return any(folder == path or folder in path.parents for folder in folders)


def is_a_file(key: str) -> bool:
    """By itself: of no folder, committed or not."""
    return not any(part.startswith((GENERATION, UNCOMMITTED)) or part == COMMIT for part in key.split("/"))


def names_in(run_dir: Path) -> set[str]:
    """What the run directory holds, at its top. Raises OSError."""
    if uri_of(run_dir) is None:
        return {entry.name for entry in run_dir.iterdir()}
    return {key.split("/")[0] for key in files_below(run_dir)}


def read_text(path: Path) -> str:
    """Of a file of the run, without touching the copy. Raises OSError."""
    if uri_of(path) is None:
        return path.read_text()
    filesystem, inner = place(path)
    with filesystem.open_input_file(inner) as stream:
        return bytes(stream.read()).decode()


def write_object(filesystem: pafs.FileSystem, inner: str, content: bytes) -> None:
    """One object, in one call: pyarrow has no way to give a half-written stream up, and closes it also on the way out of an exception."""
    with filesystem.open_output_stream(inner) as stream:
        stream.write(content)


def download(filesystem: pafs.FileSystem, inner: str, path: Path) -> None:
    with filesystem.open_input_file(inner) as source, path.open("wb") as target:
        shutil.copyfileobj(source, target, _CHUNK_BYTES)


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _upload(filesystem: pafs.FileSystem, path: Path, inner: str) -> None:
    """A file of a generation, of any size; half of one is no harm there."""
    with path.open("rb") as source, filesystem.open_output_stream(inner) as stream:
        shutil.copyfileobj(source, stream, _CHUNK_BYTES)
