"""Cut data sources into the pieces that tasks read, and read a piece.

A piece is a byte range of a jsonl file, some rows of a parquet file's row group, some rows of a hub data set, or a file
that cannot be read in parts: a compressed one, or a .json file with a list.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain, pairwise

import pyarrow as pa
import pyarrow.ipc  # noqa: F401  (pa.ipc)
import pyarrow.parquet as pq

from rm_robust.data.files import HUB, DataFile, FoundFiles, JsonLayout, json_layout, open_file, require_not_shorter
from rm_robust.data.row_texts import (
    lines_from,
    parquet_texts,
    read_hub_table,
    selected_columns,
    texts_of_file,
    texts_of_table,
)
from rm_robust.errors import DataError

_PIECE_BYTES = 2**20
"""The size of the pieces of a jsonl file, and about what one task reads."""
_ROW_GROUP_PIECE_BYTES = 16 * 2**20
"""The decoded size of the pieces of a parquet file's row group. Every piece decodes the rows before it again."""
_MAX_ROW_GROUP_PIECES = 8
_ROWS_OF_HUB_PIECE = 1024
_FOOTERS_AT_A_TIME = 16
"""The number of parquet files whose ends are read at the same time."""


@dataclass(frozen=True)
class Piece:
    """A part of a source that one task reads whole: `num_bytes` of a file or, with `rows`, a part of a row group."""

    source_number: int
    columns: frozenset[str] | None
    """The columns to read; None for all."""
    file: DataFile | None
    """The file; None for rows of a hub data set."""
    start: int = 0
    num_bytes: int = 0
    """The length of the byte range from `start`; the file's size where the file is read as a whole."""
    is_whole: bool = True
    row_group: int | None = None
    stop: int = -1
    """The first row of the row group that is no longer read."""
    table: bytes = b""
    """The rows of a hub data set, as an Arrow stream."""


def tasks_of(pieces: list[Piece]) -> list[list[Piece]]:
    """Return the pieces of each task, in order: about a mebibyte, and at least one piece."""
    tasks: list[list[Piece]] = []
    num_bytes = 0
    for piece in pieces:
        if not tasks or num_bytes + piece.num_bytes > _PIECE_BYTES:
            tasks.append([])
            num_bytes = 0
        tasks[-1].append(piece)
        num_bytes += piece.num_bytes
    return tasks


def pieces_of(
    source_number: int, paths: Sequence[str], columns: frozenset[str] | None, found: list[FoundFiles]
) -> list[Piece]:
    """Return the pieces of a source: of the files that were found, and of the hub data sets in `paths`.

    Raises DataError for a parquet file or a hub data set that cannot be read, or lacks the columns.
    """
    pieces = parquet_pieces(source_number, columns, found)
    for file in (file for part in found for file in part.files if file.suffix != ".parquet"):
        if file.compression or (file.suffix == ".json" and json_layout(file) is JsonLayout.LIST):
            pieces.append(Piece(source_number, columns, file, num_bytes=file.num_bytes))
            continue
        for start in range(0, file.num_bytes, _PIECE_BYTES):
            num_bytes = min(_PIECE_BYTES, file.num_bytes - start)
            pieces.append(Piece(source_number, columns, file, start, num_bytes, is_whole=False))
    for path in (path for path in paths if path.startswith(HUB)):
        for batch in read_hub_table(path, columns).to_batches(_ROWS_OF_HUB_PIECE):
            pieces.append(Piece(source_number, columns, None, num_bytes=batch.nbytes, table=_as_stream(batch)))
    return pieces


def parquet_pieces(source_number: int, columns: frozenset[str] | None, found: list[FoundFiles]) -> list[Piece]:
    """Return the pieces of the parquet files that were found, in order.

    Raises DataError for a file that cannot be read, or lacks the columns.
    """
    files = [file for part in found for file in part.files if file.suffix == ".parquet"]
    with ThreadPoolExecutor(_FOOTERS_AT_A_TIME) as pool:
        parts = pool.map(lambda file: _pieces_of_parquet(source_number, columns, file), files)
        return list(chain.from_iterable(parts))


def _pieces_of_parquet(source_number: int, columns: frozenset[str] | None, file: DataFile) -> list[Piece]:
    try:
        with open_file(file.root, file.path) as stream:
            parquet = pq.ParquetFile(stream)
            selected_columns(parquet.schema_arrow, columns, file.path)
            groups = [parquet.metadata.row_group(index) for index in range(parquet.metadata.num_row_groups)]
            sizes = [(group.num_rows, group.total_byte_size) for group in groups]
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{file.path} cannot be read: {error}. Replace the file, or take it away.") from error
    pieces = []
    for index, (num_rows, num_bytes) in enumerate(sizes):
        num_pieces = max(1, min(_MAX_ROW_GROUP_PIECES, num_bytes // _ROW_GROUP_PIECE_BYTES, num_rows))
        bounds = [num_rows * part // num_pieces for part in range(num_pieces + 1)]
        for start, stop in pairwise(bounds):
            part_bytes = num_bytes // num_pieces
            pieces.append(Piece(source_number, columns, file, start, part_bytes, row_group=index, stop=stop))
    return pieces


def _as_stream(batch: pa.RecordBatch) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    content: bytes = sink.getvalue().to_pybytes()
    return content


def texts_of_piece(piece: Piece) -> Iterator[str]:
    """Yield the rows of a piece as JSON texts. Raises DataError for a file that cannot be read to its end."""
    try:
        if piece.file is not None:
            require_not_shorter(piece.file)
        yield from _texts_of(piece)
    except (OSError, pa.ArrowException) as error:
        name = piece.file.path if piece.file else "a data set of the hub"
        raise DataError(f"{name} cannot be read: {error}. Replace the file, or take it away.") from error


def _texts_of(piece: Piece) -> Iterator[str]:
    file = piece.file
    if file is None:
        for batch in pa.ipc.open_stream(piece.table):
            yield from texts_of_table(batch)
    elif piece.row_group is not None:
        rows = parquet_texts(file, piece.columns, row_group=piece.row_group, start=piece.start, stop=piece.stop)
        yield from (text for _, text in rows)
    elif piece.is_whole:
        yield from (text for _, text in texts_of_file(file, piece.columns))
    else:
        lines = lines_from(file.root, file.path, start=piece.start, num_bytes=piece.num_bytes)
        yield from (text for text in lines if text.strip())
