"""Find and open the files of a data source: jsonl, json and parquet at a path or URI, and data sets of the hub.

A folder is read with everything below it. What is not read is returned too, with the reason: hidden files, other
formats, empty files, broken links, and links to what is read already.
"""

import io
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import PurePosixPath

import pyarrow as pa
import pyarrow.fs as pafs

from rm_robust.errors import DataError, RmRobustError
from rm_robust.runs import files as run_files

HUB = "hub:"
"""The prefix of a hub data set: hub:owner/name or hub:owner/name:split."""
SUFFIXES = (".jsonl", ".json", ".parquet")
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
"""The suffixes of compressed jsonl and json files, with pyarrow's names of the formats."""
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
"""What some programs, such as Excel and Notepad, write at the beginning of a UTF-8 file."""
HIDDEN = "hidden"
OTHER_FORMAT = "another format"
ONE_OBJECT = "a .json file that is neither a list nor lines of objects"
EMPTY = "empty"
LINKED_TWICE = "a link to what is read already"
NOT_A_FILE = "a broken link, or no regular file"
_HIDDEN_PREFIXES = (".", "_")
"""What the names of hidden files and folders begin with, as in Hive and pyarrow: .ipynb_checkpoints, _SUCCESS."""
_READ_AHEAD_BYTES = 2**20


class JsonLayout(StrEnum):
    """How a .json file holds its rows."""

    LINES = "lines"
    LIST = "list"
    ONE_OBJECT = "one object"


@dataclass(frozen=True)
class DataFile:
    """One file of a data source.

    `root` is the path or URI that the user named, which gives the filesystem. `path` is the file in that filesystem.
    """

    root: str
    path: str
    num_bytes: int

    @property
    def compression(self) -> str | None:
        """pyarrow's name of the format that the file is compressed with; None for a file that is not compressed."""
        return COMPRESSIONS.get(PurePosixPath(self.path).suffix.lower())

    @property
    def suffix(self) -> str:
        """The suffix in lower case, without the one of the compression."""
        name = PurePosixPath(self.path.lower())
        return PurePosixPath(name.stem).suffix if self.compression else name.suffix

    @property
    def is_readable(self) -> bool:
        """Whether the suffix is one that this project reads."""
        return self.suffix in SUFFIXES and not (self.compression and self.suffix == ".parquet")


@dataclass(frozen=True)
class SkippedFile:
    """A file in a folder that is not read."""

    path: str
    reason: str


@dataclass(frozen=True)
class FoundFiles:
    """The files of a path, sorted: those that are read, and those that are not."""

    files: list[DataFile]
    skipped: list[SkippedFile]


def list_files(path: str) -> list[DataFile]:
    """Return the files that `find_files` finds to read."""
    return find_files(path).files


def find_files(path: str) -> FoundFiles:
    """Return the file that a path or URI names, or all files below the folder.

    Raises DataError when there is no file to read, or when the path cannot be reached.
    """
    filesystem, inner_path = run_files.filesystem_of(path)
    try:
        run_files.fetch_source(path)
        entry = filesystem.get_file_info(inner_path)
        if entry.type == pafs.FileType.Directory:
            found = _read_or_skipped(path, inner_path, sorted(_entries(filesystem, inner_path)))
        else:
            found = FoundFiles([DataFile(path, inner_path, entry.size or 0)], [])
    except RmRobustError:
        raise  # such as a damaged run in an object store, whose message is its own
    except Exception as error:  # pyarrow passes on the errors of other libraries, see filesystem_of
        raise run_files.unreachable(path, error) from error
    if entry.type == pafs.FileType.NotFound:
        raise DataError(f"There is no file or folder at {run_files.full_name(path)}.")
    if entry.type == pafs.FileType.Unknown or not found.files or not all(file.is_readable for file in found.files):
        raise DataError(
            f"{path} must be a .jsonl, .json or .parquet file (the first two may end in .gz or .zst), or a folder with "
            f"such files.{_skipped_in_short(found.skipped)}"
        )
    return found


def _skipped_in_short(skipped: list[SkippedFile]) -> str:
    first = [f"{PurePosixPath(file.path).name} ({file.reason})" for file in skipped[:3]]
    return f" Not read: {len(skipped)} files, such as {', '.join(first)}." if skipped else ""


def _entries(filesystem: pafs.FileSystem, folder: str) -> Iterator[tuple[str, int, str]]:
    """Yield the path and size of every file below a folder, and why it cannot be read ("" if it can)."""
    if isinstance(filesystem, pafs.LocalFileSystem):
        yield from _local_entries(folder)
        return
    for entry in filesystem.get_file_info(pafs.FileSelector(folder, recursive=True)):
        if entry.type != pafs.FileType.Directory:
            yield entry.path, entry.size or 0, "" if entry.type == pafs.FileType.File else NOT_A_FILE


def _local_entries(folder: str) -> Iterator[tuple[str, int, str]]:
    """Yield as `_entries` does. pyarrow leaves out broken links, and follows a link to its own folder 40 times."""
    seen = {os.path.realpath(folder)}

    def is_new(path: str) -> bool:
        real = os.path.realpath(path)
        is_new = real not in seen
        seen.add(real)
        return is_new

    def fail(error: OSError) -> None:
        raise error

    for parent, folders, names in os.walk(folder, followlinks=True, onerror=fail):
        # The file or folder itself comes before the links to it.
        for name in sorted(folders, key=lambda name: os.path.islink(os.path.join(parent, name))):
            if not is_new(os.path.join(parent, name)):
                folders.remove(name)
                yield os.path.join(parent, name), 0, LINKED_TWICE
        for path in sorted((os.path.join(parent, name) for name in names), key=os.path.islink):
            if not os.path.isfile(path):
                yield path, 0, NOT_A_FILE
            else:
                yield path, os.path.getsize(path), "" if is_new(path) else LINKED_TWICE


def _read_or_skipped(root: str, folder: str, entries: list[tuple[str, int, str]]) -> FoundFiles:
    found = FoundFiles([], [])
    for path, num_bytes, problem in entries:
        file = DataFile(root, path, num_bytes)
        inside = PurePosixPath(path).parts[len(PurePosixPath(folder).parts) :]
        if any(part.startswith(_HIDDEN_PREFIXES) for part in inside):
            reason = HIDDEN
        elif problem or not file.is_readable:
            reason = problem or OTHER_FORMAT
        elif not num_bytes:
            reason = EMPTY
        elif file.suffix == ".json" and json_layout(file) is JsonLayout.ONE_OBJECT:
            reason = ONE_OBJECT
        else:
            found.files.append(file)
            continue
        found.skipped.append(SkippedFile(path, reason))
    return found


def json_layout(file: DataFile) -> JsonLayout:
    """Return how a .json file holds its rows, from its first lines.

    Raises DataError for a file that cannot be read or decompressed.
    """
    try:
        with open_rows(file) as stream:
            if stream.peek().removeprefix(BYTE_ORDER_MARK).lstrip().startswith(b"["):
                return JsonLayout.LIST
            lines = (line.removeprefix(BYTE_ORDER_MARK).strip() for line in stream)
            first, second = (next((line for line in lines if line), b"") for _ in range(2))
    except OSError as error:
        raise DataError(f"{file.path} cannot be read: {error}. Replace the file, or take it away.") from error
    if not second.startswith(b"{"):
        return JsonLayout.ONE_OBJECT
    try:
        return JsonLayout.LINES if isinstance(json.loads(first), dict) else JsonLayout.ONE_OBJECT
    except ValueError:
        return JsonLayout.ONE_OBJECT


def open_file(root: str, path: str) -> io.BufferedReader:
    """Open the file that a DataFile's `root` and `path` name, compressed as it is.

    The reader can seek, and asks an object store for one mebibyte at a time.
    """
    filesystem, _ = run_files.filesystem_of(root)
    run_files.fetch_source(root)
    return io.BufferedReader(filesystem.open_input_file(path), _READ_AHEAD_BYTES)


def require_not_shorter(file: DataFile) -> None:
    """Raise DataError for a file that is gone, or shorter than when it was found. One that has grown is as good."""
    filesystem, _ = run_files.filesystem_of(file.root)
    run_files.fetch_source(file.root)
    num_bytes = filesystem.get_file_info(file.path).size or 0
    if num_bytes < file.num_bytes:
        raise DataError(
            f"{file.path} had {file.num_bytes} bytes a moment ago and has {num_bytes}: it changed while it was read. "
            "Run the command again when nobody writes it."
        )


def open_rows(file: DataFile) -> io.BufferedReader:
    """Open a jsonl or json file, decompressed. The reader of a compressed file cannot seek."""
    opened = open_file(file.root, file.path)
    if file.compression is None:
        return opened
    return io.BufferedReader(pa.CompressedInputStream(opened, file.compression), _READ_AHEAD_BYTES)
