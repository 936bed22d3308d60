"""Read the rows of a data source: jsonl and parquet files at a path or URI, and data sets of the Hugging Face hub."""

import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from rm_robust.errors import DataError
from rm_robust.runs import files as run_files

HUB = "hub:"
"""The prefix of a hub data set: hub:owner/name or hub:owner/name:split."""
SUFFIXES = (".jsonl", ".parquet")
_ROWS_AT_A_TIME = 32
"""The number of parquet rows that are decoded at once."""
_READ_AHEAD_BYTES = 2**20


@dataclass(frozen=True)
class DataFile:
    """One file of a data source.

    `root` is the path or URI that the user named, which gives the filesystem. `path` is the file in that filesystem.
    """

    root: str
    path: str
    num_bytes: int

    @property
    def suffix(self) -> str:
        return PurePosixPath(self.path).suffix


def list_files(path: str) -> list[DataFile]:
    """Return the jsonl or parquet files that a path or URI names: the file itself, or all files below the folder.

    Raises DataError when there is no such file, or when the path cannot be reached.
    """
    filesystem, inner_path = run_files.filesystem_of(path)
    try:
        run_files.fetch_source(path)
        path_info = filesystem.get_file_info(inner_path)
        entries = (
            filesystem.get_file_info(pafs.FileSelector(inner_path, recursive=True))
            if path_info.type == pafs.FileType.Directory
            else [path_info]
        )
    except Exception as error:  # pyarrow passes on the errors of other libraries, see filesystem_of
        raise run_files.unreachable(path, error) from error
    if path_info.type == pafs.FileType.NotFound:
        raise DataError(f"There is no file or folder at {run_files.full_name(path)}.")
    files = [
        DataFile(path, entry.path, entry.size)
        for entry in sorted(entries, key=lambda entry: entry.path)
        if entry.type == pafs.FileType.File
    ]
    if path_info.type == pafs.FileType.Directory:
        files = [file for file in files if file.suffix in SUFFIXES]
    if not files or {file.suffix for file in files} - {*SUFFIXES}:
        raise DataError(f"{path} must be a .jsonl or .parquet file, or a folder with such files.")
    return files


def open_file(root: str, path: str) -> io.BufferedReader:
    """Open the file that a DataFile's `root` and `path` name.

    The reader can seek, and asks an object store for one mebibyte at a time.
    """
    filesystem, _ = run_files.filesystem_of(root)
    run_files.fetch_source(root)
    return io.BufferedReader(filesystem.open_input_file(path), _READ_AHEAD_BYTES)


def read_lines(file: DataFile) -> Iterator[str]:
    """Yield the lines of a jsonl file.

    Only "\\n" ends a line. JSON text may hold other characters that str.splitlines treats as line ends, such as U+2028.
    """
    with open_file(file.root, file.path) as stream:
        for line in stream:
            yield decoded(line)


def read_parquet_rows(file: DataFile) -> list[dict[str, Any]]:
    """Return all rows of a parquet file. Raises what pyarrow raises for a file that is not parquet."""
    with open_file(file.root, file.path) as stream:
        rows: list[dict[str, Any]] = pq.read_table(stream).to_pylist()
    return rows


def read_hub_table(path: str) -> pa.Table:
    """Return all rows of `hub:owner/name:split`; without a split, those of "train".

    Raises DataError with the reason when the data set cannot be loaded.
    """
    import datasets

    name, _, split = path.removeprefix(HUB).partition(":")
    try:
        return datasets.load_dataset(name, split=split or "train").with_format("arrow")[:]
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"{path} cannot be loaded: {error}. Check {HUB}owner/name:split, the hub's address (HF_ENDPOINT) and its "
            "token (HF_TOKEN)."
        ) from error


def read_rows(file: DataFile) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield every row of a jsonl or parquet file with the number of its line or row, counted from 1.

    Blank lines are counted and skipped. Raises DataError that names the file and its first bad line.
    """
    if file.suffix == ".parquet":
        try:
            with open_file(file.root, file.path) as stream:
                batches = pq.ParquetFile(stream).iter_batches(_ROWS_AT_A_TIME)
                yield from enumerate((row for batch in batches for row in batch.to_pylist()), start=1)
        except (OSError, pa.ArrowInvalid) as error:
            raise DataError(f"{file.path} cannot be read: {error}") from error
        return
    for number, line in enumerate(read_lines(file), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"{file.path}, line {number} is not JSON: {error}. Fix or remove the line.") from error
        if not isinstance(row, dict):
            raise DataError(f"{file.path}, line {number} must be an object, got {row!r:.200}.")
        yield number, row


def lines_from(root: str, path: str, *, start: int, num_bytes: int) -> list[str]:
    """Return the lines of a jsonl file that begin in the byte range [start, start + num_bytes)."""
    texts: list[str] = []
    with open_file(root, path) as stream:
        if start:
            stream.seek(start - 1)
            stream.readline()  # the rest of a line that begins in an earlier piece
        while stream.tell() < start + num_bytes and (line := stream.readline()):
            texts.append(decoded(line))
    return texts


def decoded(line: bytes) -> str:
    """Return a line's text without its line end.

    A line that is not UTF-8 becomes text that is not JSON, so that it counts as malformed.
    """
    try:
        return line.rstrip(b"\r\n").decode()
    except UnicodeDecodeError:
        return "not UTF-8: " + line.decode(errors="replace")
