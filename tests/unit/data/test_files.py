"""Check which files a path or URI names, and how lines are split.

s3:// is read from moto's server. No real object store was available.
"""

import json
import re
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import pytest

from rm_robust.data.files import DataFile, list_files
from rm_robust.data.row_texts import lines_from, read_hub_table, read_lines, read_rows
from rm_robust.errors import DataError
from rm_robust.runs.storage.filesystems import filesystem_of
from tests.support.s3_server import CREDENTIALS, s3_server

LINES = ['{"a": "\u2028 \x85 \x0b"}', "", '{"b": 2}', "x" * 50, '{"c": 3}']


def data_file(path: Path) -> DataFile:
    return DataFile(str(path), str(path), path.stat().st_size)


def test_lines_end_at_newlines_only_and_other_encodings_are_marked(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes("\n".join(LINES).encode() + b"\r\n\xff\xfe{}")
    lines = list(read_lines(data_file(file)))
    assert lines[:-1] == LINES
    assert "not UTF-8" in lines[-1]


@pytest.mark.parametrize("num_bytes", [1, 2, 7, 30, 52, 10_000])
@pytest.mark.parametrize("end", ["", "\n"])
@pytest.mark.parametrize("scheme", ["", "file://"])
def test_reading_a_file_in_pieces_gives_every_line_once_in_order(
    tmp_path: Path, num_bytes: int, end: str, scheme: str
) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(LINES) + end, encoding="utf-8")
    starts = range(0, file.stat().st_size, num_bytes)
    assert [
        text for start in starts for text in lines_from(f"{scheme}{file}", str(file), start=start, num_bytes=num_bytes)
    ] == LINES


def write_folder(folder: Path) -> None:
    for name in ("b.jsonl", "notes.txt", "deep/c.jsonl"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps({"file": name}) + "\n")
    pq.write_table(pa.Table.from_pylist([{"file": "a.parquet"}]), folder / "a.parquet")


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_a_path_and_its_uri_name_the_same_files_with_their_sizes_and_contents(tmp_path: Path, scheme: str) -> None:
    write_folder(tmp_path)
    files = list_files(f"{scheme}{tmp_path}")
    assert [file.path for file in files] == [str(tmp_path / name) for name in ("a.parquet", "b.jsonl", "deep/c.jsonl")]
    assert [file.num_bytes for file in files] == [Path(file.path).stat().st_size for file in files]
    assert [row for _, row in read_rows(files[0])] == [{"file": "a.parquet"}]
    assert [json.loads(line) for file in files[1:] for line in read_lines(file)] == [
        {"file": "b.jsonl"},
        {"file": "deep/c.jsonl"},
    ]
    assert [file.path for file in list_files(f"{scheme}{tmp_path}/b.jsonl")] == [str(tmp_path / "b.jsonl")]


def test_a_folder_of_a_filesystem_that_is_not_local_is_listed_and_read() -> None:
    """pyarrow's mock filesystem is in memory. filesystem_of caches one for each URI, so the rows can be read again."""
    filesystem, folder = filesystem_of("mock:///rows")
    assert isinstance(filesystem, pafs._MockFileSystem)
    filesystem.create_dir(folder)
    with filesystem.open_output_stream(f"{folder}/a.jsonl") as stream:
        stream.write("\n".join(LINES).encode())
    (file,) = list_files("mock:///rows")
    assert file == DataFile("mock:///rows", "rows/a.jsonl", len("\n".join(LINES).encode()))
    assert list(read_lines(file)) == LINES
    assert lines_from(file.root, file.path, start=len(LINES[0].encode()) + 1, num_bytes=10_000) == LINES[1:]


def test_a_bucket_is_listed_and_read_over_its_protocol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    write_folder(tmp_path)
    text = "\n".join(LINES).encode()
    with s3_server() as server:
        server.put(
            "rows",
            {
                "mine/a.parquet": (tmp_path / "a.parquet").read_bytes(),
                "mine/deep/b.jsonl": text,
                "other/c.jsonl": b"{}",
            },
        )
        options = server.options
        parquet, jsonl = list_files(f"s3://rows/mine?{options}")
        assert (parquet.path, jsonl.path, jsonl.num_bytes) == (
            "rows/mine/a.parquet",
            "rows/mine/deep/b.jsonl",
            len(text),
        )
        assert [row for _, row in read_rows(parquet)] == [{"file": "a.parquet"}]
        assert list(read_lines(jsonl)) == LINES
        assert [
            line
            for start in range(0, len(text), 7)
            for line in lines_from(jsonl.root, jsonl.path, start=start, num_bytes=7)
        ] == LINES
        assert list_files(f"s3://rows/mine/deep/b.jsonl?{options}")[0].num_bytes == len(text)
        with pytest.raises(DataError, match=r"no file or folder at s3://rows/nothing\?"):
            list_files(f"s3://rows/nothing?{options}")
        with pytest.raises(
            DataError, match=r"s3://absent/mine\?.* cannot be reached|no file or folder at s3://absent/mine\?"
        ):
            list_files(f"s3://absent/mine?{options}")


def test_a_relative_path_is_found_from_the_working_directory_and_a_tilde_from_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "b.jsonl").write_text("{}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    filesystem_of.cache_clear()
    assert [file.path for path in ("b.jsonl", "./b.jsonl", "~/b.jsonl") for file in list_files(path)] == [
        str(tmp_path / "b.jsonl")
    ] * 3


@pytest.mark.parametrize(
    ("path", "problem"),
    [
        ("/nowhere/rows.jsonl", "There is no file or folder at /nowhere/rows.jsonl."),
        ("file:///nowhere/rows.jsonl", "There is no file or folder at file:///nowhere/rows.jsonl."),
        ("mock:///nowhere/rows.jsonl", "There is no file or folder at mock:///nowhere/rows.jsonl."),
        ("ftp://host/rows.jsonl", "ftp://host/rows.jsonl is no usable URI: "),
        (
            "s3://bucket/rows.jsonl?endpoint_override=127.0.0.1:9&scheme=http&region=us-east-1&patience=1",
            "is no usable URI: ",
        ),
        ("s3://bucket/rows.jsonl?endpoint_override=127.0.0.1:9&scheme=http&region=us-east-1", "cannot be reached: "),
    ],
)
def test_what_is_not_there_or_cannot_be_reached_is_refused_by_its_name(path: str, problem: str) -> None:
    with pytest.raises(DataError) as refused:
        list_files(path)
    assert problem in str(refused.value)


def test_a_password_in_a_uri_is_refused_and_not_repeated() -> None:
    with pytest.raises(DataError, match="holds a password") as refused:
        list_files("s3://key:secret@bucket/rows.jsonl")
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_files_of_another_format_and_folders_without_rows_are_refused(tmp_path: Path, scheme: str) -> None:
    (tmp_path / "rows.csv").write_text("a,b")
    (tmp_path / "folder").mkdir()
    for name in ("rows.csv", "folder"):
        with pytest.raises(DataError) as refused:
            list_files(f"{scheme}{tmp_path}/{name}")
        assert f"{scheme}{tmp_path}/{name} must be a .jsonl, .json or .parquet file" in str(refused.value)


@pytest.mark.parametrize(
    ("split", "is_offline", "reason"), [(":tset", False, 'Unknown split "tset"'), ("", True, "the Hub")]
)
def test_a_hub_data_set_that_cannot_be_loaded_is_refused_by_name_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, split: str, is_offline: bool, reason: str
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", is_offline)
    (tmp_path / "train.jsonl").write_text('{"prompt": "red"}\n')
    name = "owner/no_such_data_set" if is_offline else str(tmp_path)  # a folder is loaded like what the hub has
    with pytest.raises(DataError, match=re.escape(f"hub:{name}{split} cannot be loaded: ")) as refused:
        read_hub_table(f"hub:{name}{split}", None)
    assert reason in str(refused.value)
    assert "HF_TOKEN" in str(refused.value)
