"""The jsonl and parquet files of a source: what lies at a path or URI (filesystems.py), and its lines; and what the hub has."""

import functools
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from rm_robust.errors import DataError
from rm_robust.runs.storage.filesystems import filesystem_of, is_uri, unreachable
from rm_robust.runs.storage.transfer import pull_folder

HUB = "hub:"
SUFFIXES = (".jsonl", ".parquet")
_ROWS_AT_A_TIME = 32
_READ_AHEAD_BYTES = 2**20


@dataclass(frozen=True)
class DataFile:
    """One file. `root` (what the user named) tells the filesystem, `path` the file in it."""

    root: str
    path: str
    num_bytes: int

    @property
    def suffix(self) -> str:
        return PurePosixPath(self.path).suffix


def list_files(path: str) -> list[DataFile]:
    """The jsonl or parquet files that a path or URI names: itself, or those in the folder. Raises DataError when nothing is there or can be reached."""
    filesystem, inner = filesystem_of(path)
    try:
        pull_for_reading(path)
        found = filesystem.get_file_info(inner)
        entries = (
            filesystem.get_file_info(pafs.FileSelector(inner, recursive=True))
            if found.type == pafs.FileType.Directory
            else [found]
        )
    except Exception as error:  # as in filesystem_of
        raise unreachable(path, error) from error
    if found.type == pafs.FileType.NotFound:
        raise DataError(f"There is no file or folder at {path if is_uri(path) else inner}.")
    files = [
        DataFile(path, entry.path, entry.size)
        for entry in sorted(entries, key=lambda entry: entry.path)
        if entry.type == pafs.FileType.File
    ]
    if found.type == pafs.FileType.Directory:
        files = [file for file in files if file.suffix in SUFFIXES]
    if not files or {file.suffix for file in files} - {*SUFFIXES}:
        raise DataError(f"{path} must be a .jsonl or .parquet file, or a folder with such files.")
    return files


def open_file(root: str, path: str) -> io.BufferedReader:
    """A DataFile's bytes, with seek and readline; object stores are asked for a mebibyte at a time."""
    filesystem, _ = filesystem_of(root)
    pull_for_reading(root)
    return io.BufferedReader(filesystem.open_input_file(path), _READ_AHEAD_BYTES)


@functools.lru_cache(maxsize=64)
def pull_for_reading(path: str) -> None:
    """Files of the run itself, where that lies in an object store and this node is another than the one that wrote them. Once a process: they stay."""
    if not is_uri(path):
        pull_folder(Path(path).expanduser().absolute())


def read_lines(file: DataFile) -> Iterator[str]:
    """The lines of a jsonl file. Only "\\n" ends one: JSON texts may hold what str.splitlines takes for a line end, U+2028 for example."""
    with open_file(file.root, file.path) as lines:
        for line in lines:
            yield decoded(line)


def read_parquet_rows(file: DataFile) -> list[dict[str, Any]]:
    with open_file(file.root, file.path) as opened:
        rows: list[dict[str, Any]] = pq.read_table(opened).to_pylist()
    return rows


def read_hub_table(path: str) -> pa.Table:
    """All rows of `hub:owner/name`, or of `hub:owner/name:split`, by default its split "train". Raises DataError with the reason why there are none."""
    import datasets

    name, _, split = path.removeprefix(HUB).partition(":")
    try:
        return datasets.load_dataset(name, split=split or "train").with_format("arrow")[:]
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"{path} cannot be loaded: {error}. Check {HUB}owner/name:split, the hub's address (HF_ENDPOINT) and its token (HF_TOKEN)."
        ) from error


def read_rows(file: DataFile) -> Iterator[tuple[int, dict[str, Any]]]:
    """Every row of a jsonl or parquet file with the number of its line or row, from 1; blank lines are none. Raises DataError naming the first bad one."""
    if file.suffix == ".parquet":
        try:
            with open_file(file.root, file.path) as opened:
                batches = pq.ParquetFile(opened).iter_batches(_ROWS_AT_A_TIME)
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
            raise DataError(f"{file.path}, line {number} is not JSON: {error}. Mend or remove the line.") from error
        if not isinstance(row, dict):
            raise DataError(f"{file.path}, line {number} must be an object, got {row!r:.200}.")
        yield number, row


def lines_from(root: str, path: str, *, start: int, num_bytes: int) -> list[str]:
    """The lines that begin in [start, start + num_bytes) of a jsonl file."""
    texts: list[str] = []
    with open_file(root, path) as file:
        if start:
            file.seek(start - 1)
            file.readline()  # the rest of a line that began in an earlier piece
        while file.tell() < start + num_bytes and (line := file.readline()):
            texts.append(decoded(line))
    return texts


def decoded(line: bytes) -> str:
    """A line's text without its end; one that is not UTF-8 becomes no JSON, so that it counts as malformed."""
    try:
        return line.rstrip(b"\r\n").decode()
    except UnicodeDecodeError:
        return "not UTF-8: " + line.decode(errors="replace")
