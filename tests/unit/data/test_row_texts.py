"""Check that tables as people have them are read as what they mean, or refused with the reason.

The expected rows are written by hand; pyarrow, gzip and json write the files.
"""

import gzip
import json
import os
from collections.abc import Callable
from datetime import datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rm_robust.config.data import DataConfig
from rm_robust.data import pieces as data_pieces
from rm_robust.data.files import DataFile, find_files, list_files
from rm_robust.data.pipeline import DataSource, check_sources
from rm_robust.data.row_texts import parquet_texts, read_rows, texts_of_path
from rm_robust.data.rows import COLUMNS, RowKind, parse_row, row_of
from rm_robust.errors import CheckpointError, DataError
from rm_robust.evaluation.preferences import parse
from rm_robust.runs import files as run_files

PAIR = {"prompt": "red\u2028?", "chosen": "green", "rejected": "seven"}
OTHER = {"prompt": "blue?", "chosen": "green", "rejected": "eight"}


def rows_of(path: Path | str) -> list[dict[str, Any]]:
    """Return the rows as the pipeline reads them; "malformed" and the reason for a row that it would drop."""
    rows = []
    for text in texts_of_path(str(path), COLUMNS):
        try:
            rows.append(row_of(text))
        except DataError as error:
            rows.append({"malformed": str(error)})
    return rows


def lines(*rows: dict[str, Any]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", lines(PAIR, OTHER)),
        ("a.JSONL", b"\xef\xbb\xbf" + lines(PAIR, OTHER)),
        ("a.jsonl", lines(PAIR, OTHER).replace(b"\n", b"\r\n")),
        ("a.jsonl", lines(PAIR) + b"\xef\xbb\xbf" + lines(OTHER)),  # two files joined
        ("a.jsonl.gz", gzip.compress(lines(PAIR, OTHER))),
        ("a.jsonl.gz", gzip.compress(lines(PAIR)) + gzip.compress(lines(OTHER))),
        ("a.json", json.dumps([PAIR, OTHER], indent=1).encode()),
        ("a.json", b"\xef\xbb\xbf\n " + json.dumps([PAIR, OTHER]).encode()),
        ("a.json", lines(PAIR, OTHER)),
        ("a.json.gz", gzip.compress(json.dumps([PAIR, OTHER]).encode())),
    ],
)
@pytest.mark.parametrize("in_folder", [True, False])
def test_every_form_of_json_gives_the_same_rows(tmp_path: Path, name: str, content: bytes, in_folder: bool) -> None:
    (tmp_path / name).write_bytes(content)
    assert rows_of(tmp_path if in_folder else tmp_path / name) == [PAIR, OTHER]


def test_zstd_is_read(tmp_path: Path) -> None:
    with pa.CompressedOutputStream(str(tmp_path / "a.jsonl.zst"), "zstd") as stream:
        stream.write(lines(PAIR, OTHER))
    assert rows_of(tmp_path) == [PAIR, OTHER]


def column(values: list[Any], data_type: pa.DataType) -> pa.Table:
    return pa.table({"prompt": pa.array(values, data_type), "chosen": ["a"] * len(values)})


@pytest.mark.parametrize(
    "data_type",
    [
        pa.binary(),
        pa.large_binary(),
        pa.string(),
        pa.large_string(),
        pa.string_view(),
        pa.dictionary(pa.int32(), pa.string()),
        pa.dictionary(pa.int32(), pa.binary()),
    ],
)
def test_text_is_text_whatever_its_column_is_called_in_arrow(tmp_path: Path, data_type: pa.DataType) -> None:
    values = ["é", "red"] if "binary" not in str(data_type) else ["é".encode(), b"red"]
    pq.write_table(column(values, data_type), tmp_path / "a.parquet")
    assert [row["prompt"] for row in rows_of(tmp_path)] == ["é", "red"]


def test_nested_binary_decimals_and_nulls_are_what_they_mean(tmp_path: Path) -> None:
    turn = pa.struct([("role", pa.binary()), ("content", pa.large_string()), ("tool_calls", pa.list_(pa.string()))])
    table = pa.table(
        {
            "prompt": pa.array([[{"role": b"user", "content": "red?", "tool_calls": None}]], pa.list_(turn)),
            "completions": pa.array([["a", "b"]], pa.large_list(pa.string())),
            "gold_scores": pa.array([[Decimal("0.50"), Decimal("2.00")]], pa.list_(pa.decimal128(9, 2))),
            "margin": pa.array([Decimal("1.25")], pa.decimal256(50, 2)),
            "pair_id": pa.array([Decimal("7")], pa.decimal128(9, 0)),
        }
    )
    pq.write_table(table, tmp_path / "a.parquet")
    (row,) = rows_of(tmp_path)
    assert row["prompt"] == [{"role": "user", "content": "red?", "tool_calls": None}]
    assert (row["gold_scores"], row["margin"], row["pair_id"]) == ([0.5, 2], 1.25, 7)
    assert parse_row(row, RowKind.RANKED).gold_scores == [0.5, 2.0]


def test_files_of_a_folder_do_not_change_each_other_and_unread_columns_change_nothing(tmp_path: Path) -> None:
    """One file has binary text, another decimals; the unread column has three types, one of which JSON cannot hold."""
    pq.write_table(pa.table({"prompt": [b"a"], "margin": [1.5], "extra": [1]}), tmp_path / "1.parquet")
    pq.write_table(pa.table({"prompt": ["b"], "margin": [Decimal("2.5")], "extra": ["x"]}), tmp_path / "2.parquet")
    extra = pa.array([b"\xff"], pa.binary())
    pq.write_table(pa.table({"prompt": ["c"], "margin": [3], "extra": extra}), tmp_path / "3.parquet")
    assert rows_of(tmp_path) == [{"prompt": p, "margin": m} for p, m in (("a", 1.5), ("b", 2.5), ("c", 3))]


@pytest.mark.parametrize(
    ("array", "reason"),
    [
        (pa.array([b"\xff\xfe"]), r"column 'prompt' holds bytes that are not UTF-8"),
        (pa.array([datetime(2024, 1, 2)]), r"column 'prompt' holds a datetime \(2024-01-02"),
    ],
)
def test_a_value_that_is_no_text_makes_its_row_malformed_and_no_other(
    tmp_path: Path, array: pa.Array, reason: str
) -> None:
    other = pa.nulls(1, array.type)
    pq.write_table(
        pa.table({"prompt": pa.concat_arrays([array, other]), "id": array.take([0, 0])}), tmp_path / "a.parquet"
    )
    bad, good = rows_of(tmp_path)
    assert good["prompt"] is None
    with pytest.raises(DataError, match=reason):
        raise DataError(bad["malformed"])


def test_a_margin_that_is_not_a_number_is_refused(tmp_path: Path) -> None:
    pq.write_table(
        pa.table({**{name: [text] for name, text in PAIR.items()}, "margin": [float("nan")]}), tmp_path / "a.parquet"
    )
    with pytest.raises(DataError, match="margin is nan"):
        parse_row(rows_of(tmp_path)[0], RowKind.PAIR)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (lines(PAIR).decode().encode("utf-16"), "not UTF-8"),
        (lines(PAIR).decode().replace("\u2028", "").encode("utf-16-le"), "null bytes"),
        (b"\0" * 20, "null bytes"),
        (b'{"prompt": "a", "prompt": "b"}', "'prompt' is there twice"),
        (gzip.compress(lines(PAIR)), "not UTF-8"),
    ],
)
def test_a_line_that_cannot_be_meant_is_malformed_with_the_reason(tmp_path: Path, content: bytes, reason: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(content)
    assert reason in rows_of(tmp_path)[0]["malformed"]


def damaged(path: Path) -> None:
    pq.write_table(pa.Table.from_pylist([PAIR] * 100), path)
    path.write_bytes(path.read_bytes()[:-20])


@pytest.mark.parametrize(
    ("name", "write", "reason"),
    [
        ("a.parquet", damaged, "cannot be read"),
        ("a.parquet", lambda path: path.write_bytes(b"no parquet"), "cannot be read"),
        (
            "a.parquet",
            lambda path: pq.write_table(pa.table({"question": ["x"]}), path),
            r"\['question'\], none of which",
        ),
        (
            "a.parquet",
            lambda path: pq.write_table(pa.table([["a"], ["b"]], names=["chosen", "chosen"]), path),
            "several columns called 'chosen'",
        ),
        ("a.json.gz", lambda path: path.write_bytes(gzip.compress(os.urandom(9999))[:5000]), "cannot be read"),
    ],
)
def test_a_damaged_or_foreign_table_is_one_line_before_ray_starts(
    tmp_path: Path, name: str, write: Callable[[Path], object], reason: str
) -> None:
    (tmp_path / "good.jsonl").write_bytes(lines(PAIR))
    write(tmp_path / name)
    with pytest.raises(DataError, match=f"{name}.*{reason}"):
        check_sources([DataSource("train", (str(tmp_path),), RowKind.PAIR)])


def test_a_compressed_file_that_breaks_off_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines(*[PAIR] * 999))[:-30])
    with pytest.raises(DataError, match="a.jsonl.gz cannot be read"):
        rows_of(tmp_path)


def test_what_a_folder_holds_beside_its_rows_is_named_with_the_reason(tmp_path: Path) -> None:
    for name in ("a.jsonl", ".ipynb_checkpoints/a.jsonl", "._a.jsonl", "_temporary/b.jsonl", "deep/c.JSONL"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(lines(PAIR))
    (tmp_path / "rows.csv").write_text("a,b")
    (tmp_path / "d.parquet.gz").write_bytes(b"x")
    (tmp_path / "empty.parquet").touch()
    (tmp_path / "dataset_info.json").write_text(json.dumps({"features": {}}, indent=1))
    (tmp_path / "link.jsonl").symlink_to("a.jsonl")
    (tmp_path / "loop").symlink_to(".")
    (tmp_path / "broken.jsonl").symlink_to("nowhere")
    found = find_files(str(tmp_path))
    assert [Path(file.path).name for file in found.files] == ["a.jsonl", "c.JSONL"]
    assert {str(Path(file.path).relative_to(tmp_path)): file.reason for file in found.skipped} == {
        ".ipynb_checkpoints/a.jsonl": "hidden",
        "._a.jsonl": "hidden",
        "_temporary/b.jsonl": "hidden",
        "rows.csv": "another format",
        "d.parquet.gz": "another format",
        "empty.parquet": "empty",
        "dataset_info.json": "a .json file that is neither a list nor lines of objects",
        "link.jsonl": "a link to what is read already",
        "loop": "a link to what is read already",
        "broken.jsonl": "a broken link, or no regular file",
    }
    assert rows_of(tmp_path) == [PAIR, PAIR]


def test_a_damaged_run_in_an_object_store_keeps_its_own_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fetch(path: str) -> None:
        raise CheckpointError(f"{path} holds other bytes than were committed.")

    monkeypatch.setattr(run_files, "fetch_source", fetch)
    with pytest.raises(CheckpointError, match="other bytes than were committed"):
        list_files(str(tmp_path))


def test_training_evaluation_and_hub_read_the_same_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "mine").mkdir()
    table = pa.table({name: [text.encode()] for name, text in PAIR.items()} | {"extra": [datetime(2024, 1, 2)]})
    pq.write_table(table, tmp_path / "mine" / "train.parquet")
    assert rows_of(tmp_path / "mine") == rows_of(f"hub:{tmp_path}/mine") == [PAIR]
    ((_, row),) = read_rows(list_files(str(tmp_path / "mine"))[0], COLUMNS)
    case = parse(row, by=None)
    assert (case.prompt, case.completions) == ([{"role": "user", "content": "red\u2028?"}], ["green", "seven"])


def test_all_columns_are_read_for_reward_functions(tmp_path: Path) -> None:
    table = pa.table({"prompt": ["2 + 2"], "answer": [Decimal("4")], "image": [b"\xff"], "day": [datetime(2024, 1, 2)]})
    pq.write_table(table, tmp_path / "a.parquet")
    columns = DataSource("rloo_prompts", (), RowKind.PROMPT).columns
    (text,) = texts_of_path(str(tmp_path), columns)
    assert row_of(text) == {"prompt": "2 + 2", "answer": 4, "image": "ff", "day": "2024-01-02 00:00:00"}


@pytest.mark.parametrize("num_pieces", [1, 3, 7])
def test_the_pieces_of_a_parquet_file_have_every_row_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_pieces: int
) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"prompt": [f"{i}" for i in range(250)]}), path, row_group_size=100)
    size = pq.ParquetFile(path).metadata.row_group(0).total_byte_size
    monkeypatch.setattr(data_pieces, "_ROW_GROUP_PIECE_BYTES", size // num_pieces)
    file = DataFile(str(path), str(path), path.stat().st_size)
    pieces = data_pieces._pieces_of_parquet(0, COLUMNS, file)
    assert len(pieces) >= 2 * num_pieces + 1
    texts = [
        json.loads(text)["prompt"]
        for piece in pieces
        for _, text in parquet_texts(file, COLUMNS, row_group=piece.row_group, start=piece.start, stop=piece.stop)
    ]
    assert texts == [f"{i}" for i in range(250)]


def test_many_small_sources_are_few_tasks_and_a_large_file_is_many(tmp_path: Path) -> None:
    sources = []
    for number in range(35):
        (tmp_path / f"{number}.jsonl").write_bytes(lines(PAIR))
        sources.append(DataSource("train", (str(tmp_path / f"{number}.jsonl"),), RowKind.PAIR))
    (tmp_path / "large.jsonl").write_bytes(lines(PAIR) * (4 * 2**20 // len(lines(PAIR))))
    sources.append(DataSource("train", (str(tmp_path / "large.jsonl"),), RowKind.PAIR))
    pieces = [
        piece
        for number, source in enumerate(sources)
        for piece in data_pieces.pieces_of(number, source.paths, COLUMNS, [find_files(source.paths[0])])
    ]
    tasks = data_pieces.tasks_of(pieces)
    assert [len(task) for task in tasks] == [35, 1, 1, 1, 1]
    texts = [text for task in tasks for piece in task for text in data_pieces.texts_of_piece(piece)]
    assert len(texts) == 35 + 4 * 2**20 // len(lines(PAIR))


def test_a_file_that_grows_is_read_as_it_was_found_and_one_that_shrinks_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines(PAIR, PAIR))
    (piece,) = data_pieces.pieces_of(0, [str(path)], COLUMNS, [find_files(str(path))])
    path.write_bytes(lines(PAIR, PAIR, OTHER))
    assert len(list(data_pieces.texts_of_piece(piece))) == 2
    path.write_bytes(lines(PAIR))
    with pytest.raises(DataError, match="a.jsonl had .* bytes a moment ago"):
        list(data_pieces.texts_of_piece(piece))
    path.unlink()
    with pytest.raises(DataError, match="a.jsonl had .* bytes a moment ago and has 0"):
        list(data_pieces.texts_of_piece(piece))


def test_a_hub_name_in_the_responses_is_refused_by_the_config() -> None:
    with pytest.raises(ValueError, match="'hub:owner/name': it takes files only"):
        DataConfig.model_validate({"source": "responses", "responses": ["hub:owner/name"], "unseen_models": ["m"]})
