"""Read the rows of files as JSON texts: one reader for training, evaluation and responses.

A jsonl line stays as it is, so that a torn line is one malformed row. Of parquet files and hub data sets, only the
columns that the reader declares are decoded, each file for itself, so that another file's types and a column that
nobody reads change nothing. Binary text is decoded as UTF-8 and a decimal becomes a number. A row that cannot be read
becomes a text that `rows.row_of` refuses with the reason.
"""

import json
import uuid
from collections.abc import Callable, Iterator
from decimal import Decimal
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rm_robust.data.files import (
    BYTE_ORDER_MARK,
    HUB,
    DataFile,
    JsonLayout,
    json_layout,
    list_files,
    open_file,
    open_rows,
)
from rm_robust.data.rows import COLUMNS, ID_LIKE_COLUMNS, RELEASED_RESPONSE, UNREADABLE, row_of
from rm_robust.errors import DataError

_ROWS_AT_A_TIME = 32
"""The number of parquet rows that are decoded at once."""
_QUOTED = 80
"""The number of bytes of an unreadable line that its reason quotes."""


def texts_of_file(file: DataFile, columns: frozenset[str] | None) -> Iterator[tuple[int, str]]:
    """Yield every row of a file as JSON text, with the number of its line or row, counted from 1.

    `columns` are those to read of a parquet file; None for all. Blank lines are counted and skipped. Raises DataError
    that names a file that cannot be read.
    """
    try:
        if file.suffix == ".parquet":
            yield from parquet_texts(file, columns)
        elif file.suffix == ".json" and json_layout(file) is JsonLayout.LIST:
            yield from _texts_of_list(file)
        else:
            for number, line in enumerate(read_lines(file), start=1):
                if line.strip():
                    yield number, line
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{file.path} cannot be read: {error}. Replace the file, or take it away.") from error


def read_rows(file: DataFile, columns: frozenset[str] | None = None) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield every row of a file with the number of its line or row, as `texts_of_file` does.

    Raises DataError that names the file and its first bad line.
    """
    place = "row" if file.suffix == ".parquet" else "line"
    for number, text in texts_of_file(file, columns):
        try:
            row = row_of(text)
        except DataError as error:
            raise DataError(f"{file.path}, {place} {number}: {error}. Fix or remove it.") from error
        yield number, row


def texts_of_path(path: str, columns: frozenset[str] | None) -> Iterator[str]:
    """Yield the rows of all files of a path, or of a hub data set, as JSON texts."""
    if path.startswith(HUB):
        table = read_hub_table(path, columns)
        yield from (text for batch in table.to_batches(1024) for text in texts_of_table(batch))
        return
    for file in list_files(path):
        yield from (text for _, text in texts_of_file(file, columns))


def read_lines(file: DataFile) -> Iterator[str]:
    """Yield the lines of a jsonl file, decompressed.

    Only "\\n" ends a line. JSON text may hold other characters that str.splitlines treats as line ends, such as U+2028.
    """
    with open_rows(file) as stream:
        for line in stream:
            yield decoded(line)


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
    """Return a line's text without its line end, and without the byte-order mark that it may begin with.

    A line that is not UTF-8 becomes a text that `rows.row_of` refuses, so that it counts as malformed.
    """
    line = line.rstrip(b"\r\n").removeprefix(BYTE_ORDER_MARK)
    try:
        text = line.decode()
    except UnicodeDecodeError as error:
        return (
            f"{UNREADABLE}not UTF-8 ({error.reason}); save the file as UTF-8: {line[:_QUOTED].decode(errors='replace')}"
        )
    if "\0" in text:
        return (
            f"{UNREADABLE}null bytes in the text, as in a UTF-16 or a damaged file; save it as UTF-8: {text[:_QUOTED]}"
        )
    return text


def parquet_texts(
    file: DataFile, columns: frozenset[str] | None, *, row_group: int | None = None, start: int = 0, stop: int = -1
) -> Iterator[tuple[int, str]]:
    """Yield the rows of a parquet file as JSON texts, numbered from 1.

    With `row_group`, yield only the rows from `start` to before `stop` of that row group. Raises what pyarrow raises
    for a file that is not parquet, and DataError for columns that are missing or that two columns are called.
    """
    with open_file(file.root, file.path) as stream:
        parquet = pq.ParquetFile(stream)
        names = selected_columns(parquet.schema_arrow, columns, file.path)
        groups = None if row_group is None else [row_group]
        first = 0
        for batch in parquet.iter_batches(_ROWS_AT_A_TIME, row_groups=groups, columns=names):
            offset = min(max(0, start - first), batch.num_rows)
            part = batch.slice(offset, batch.num_rows if stop < 0 else max(0, stop - first - offset))
            yield from enumerate(texts_of_table(part), start=first + offset + 1)
            first += batch.num_rows
            if 0 <= stop <= first:
                return


def selected_columns(schema: pa.Schema, columns: frozenset[str] | None, name: str) -> list[str]:
    """Return the columns of a table to read.

    Raises DataError, with the table's `name`, when it has none of them, or one of them twice.
    """
    names = [
        column for column in schema.names if columns is None or column in columns or RELEASED_RESPONSE.fullmatch(column)
    ]
    if not names:
        raise DataError(f"{name} has the columns {schema.names}, none of which holds a prompt or a completion.")
    twice = sorted({column for column in names if names.count(column) > 1})
    if twice:
        raise DataError(f"{name} has several columns called {twice[0]!r}. Rename all but one.")
    return names


def texts_of_table(table: pa.Table | pa.RecordBatch) -> list[str]:
    """Return the rows of a table as JSON texts."""
    return [_text_of_row(row) for row in table.to_pylist()]


def _text_of_row(row: dict[str, Any]) -> str:
    try:
        return _as_json(row, _plain)
    except DataError:
        pass  # one of the columns cannot be plain JSON: is it one whose value must be?
    for name, value in row.items():
        try:
            _as_json(value, _plain)
        except DataError as error:
            if name in COLUMNS - ID_LIKE_COLUMNS or RELEASED_RESPONSE.fullmatch(name):
                return f"{UNREADABLE}column {name!r} holds {error}"
    return _as_json(row, _named)


def _as_json(value: object, default: Callable[[Any], object]) -> str:
    return json.dumps(value, ensure_ascii=False, default=default)


def _plain(value: Any) -> object:
    """Return a value that JSON has no form for as the text or number that it stands for."""
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError as error:
            raise DataError(f"bytes that are not UTF-8 ({error.reason} at byte {error.start})") from error
    if isinstance(value, Decimal):
        return int(value) if value == value.to_integral_value() else float(value)
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, uuid.UUID):
        return str(value)
    raise DataError(f"a {type(value).__name__} ({str(value):.80}), which is no text, number, list or object")


def _named(value: Any) -> object:
    """Return any value as `_plain` does, or else as the text that names it. Ids and columns for rewards may be so."""
    try:
        return _plain(value)
    except DataError:
        return value.hex() if isinstance(value, bytes) else str(value)


def _texts_of_list(file: DataFile) -> Iterator[tuple[int, str]]:
    """Yield the elements of a .json file that holds a list. The file is read as a whole."""
    with open_rows(file) as stream:
        try:
            rows = json.loads(stream.read().decode("utf-8-sig"))
        except (ValueError, RecursionError) as error:
            raise DataError(f"{file.path} is not a list in JSON: {error}. Fix the file.") from error
    for number, row in enumerate(rows, start=1):
        yield number, json.dumps(row, ensure_ascii=False)


def read_hub_table(path: str, columns: frozenset[str] | None) -> pa.Table:
    """Return the declared columns of all rows of `hub:owner/name:split`; without a split, those of "train".

    Raises DataError with the reason when the data set cannot be loaded.
    """
    import datasets

    name, _, split = path.removeprefix(HUB).partition(":")
    try:
        table = datasets.load_dataset(name, split=split or "train").with_format("arrow")[:]
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"{path} cannot be loaded: {error}. Check {HUB}owner/name:split, the hub's address (HF_ENDPOINT) and its "
            "token (HF_TOKEN)."
        ) from error
    return table.select(selected_columns(table.schema, columns, path))
