"""Files of JSON lines that outlive a kill: rows are appended, and only a whole last line counts.

A killed process can leave a part of its last line, a torn line. Readers leave it out; `end_last_line` cuts it off
before more rows are appended. Lines end at a newline byte alone: texts may hold U+2028 and the other characters that
str.splitlines splits at. Only the standard library is needed here, because the light scoring client writes such files
too.
"""

import json
import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from rm_robust.errors import DataError

logger = logging.getLogger(__name__)


def as_line(row: Mapping[str, Any]) -> str:
    """Return the row as one line of JSON, with its newline. Half of a surrogate pair, which UTF-8 lacks, is escaped."""
    return json.dumps(row, ensure_ascii=False).encode(errors="backslashreplace").decode() + "\n"


def append_rows(path: Path, rows: Iterable[Mapping[str, Any]], *, sync: bool = False) -> None:
    """Append the rows in one write; with `sync`, return only when they are on the disk. Raises OSError."""
    with path.open("ab") as file:
        file.write("".join(map(as_line, rows)).encode())
        file.flush()
        if sync:
            os.fsync(file.fileno())


def rows_of(path: Path, *, row_name: str = "JSON") -> Iterator[tuple[int, Any]]:
    """Yield the number of each line, from 1, and its JSON value.

    A torn last line is left out, and a file that does not exist has no lines. Memory does not grow with the file.
    Raises DataError for any other line that is not JSON. `row_name` says in its message what a line should be.
    """
    if not path.exists():
        return
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                row = json.loads(line)
            except ValueError as error:
                if not line.endswith(b"\n"):
                    logger.warning(
                        "%s: the last line is torn (a process was killed while writing it) and is left out", path
                    )
                    return
                raise bad_line(path, number, row_name, line.decode(errors="replace").rstrip("\n")) from error
            yield number, row


def bad_line(path: Path, number: int, row_name: str, text: str) -> DataError:
    """Return the error for a line that is not what its file should hold."""
    return DataError(f"{path}, line {number} is not {row_name}: {text[:80]!r}. Restore the file or delete that line.")


def torn_line(path: Path) -> bytes:
    """Return the torn last line of a file; empty where the last line is whole or there is no file."""
    last_line = b""
    if path.exists():
        with path.open("rb") as file:
            for line in file:
                last_line = line
    if last_line.endswith(b"\n"):
        return b""
    try:
        json.loads(last_line)
    except ValueError:
        return last_line
    return b""


def end_last_line(path: Path) -> None:
    """Make an existing file end with a whole line: cut a torn last line off, and give a complete one its newline."""
    if torn := torn_line(path):
        os.truncate(path, path.stat().st_size - len(torn))
    with path.open("rb+") as file:
        if file.seek(0, os.SEEK_END) == 0:
            return
        file.seek(-1, os.SEEK_END)
        if file.read(1) != b"\n":
            file.write(b"\n")
