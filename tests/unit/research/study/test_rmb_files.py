"""RMB's pairs by scenario: training sees no completion of an in-domain pair, and every pair is in a file or counted."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from research.study.rmb_files import write_rmb_files
from rm_robust.data.scenarios import SCENARIOS
from rm_robust.errors import DataError


def pair(number: int, **changes: object) -> dict[str, Any]:
    prompt = number // 6
    texts = [f"answer {prompt}.{(number + shift) % 4}" for shift in (0, 1)]
    row = {
        "pair_uid": f"u{number}", "prompt_id": f"p{prompt}", "n_unseen_models": 0, "prompt_split": "train",
        "messages": [{"role": "user", "content": f"question {prompt}"}], "chosen": texts[0], "rejected": texts[1],
        "chosen_model": "gpt-4o", "rejected_model": "claude",
    }  # fmt: skip
    return row | changes


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    rows = [pair(number) for number in range(300)]
    rows += [
        pair(600, prompt_split="unseen"),
        pair(606, n_unseen_models=1),
        pair(612, prompt_split="unseen", n_unseen_models=2),
    ]
    rows += [pair(618, messages=[{"role": "user", "content": "  "}])]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rmb_pairs.parquet")
    return tmp_path


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_pair_is_in_one_scenario_or_counted(data_dir: Path, tmp_path: Path) -> None:
    write_rmb_files(data_dir, tmp_path / "out")
    files = {name: lines_of(tmp_path / "out" / f"{name}.jsonl") for name in ("train", *SCENARIOS)}
    manifest = json.loads((tmp_path / "out" / "source.json").read_text())
    uids = [row["pair_uid"] for rows in files.values() for row in rows]
    assert (
        len(uids)
        == len(set(uids))
        == 304 - manifest["empty_last_turn"] - manifest["shares_a_completion_with_in_domain"]
    )
    assert manifest["empty_last_turn"] == 1
    assert [[row["pair_uid"] for row in files[name]] for name in SCENARIOS[1:]] == [["u600"], ["u606"], ["u612"]]
    assert 15 < len(files["in_domain"]) < 70


def test_no_completion_of_an_in_domain_pair_is_trained_on(data_dir: Path, tmp_path: Path) -> None:
    write_rmb_files(data_dir, tmp_path / "out")
    train, in_domain, sft = (lines_of(tmp_path / "out" / f"{name}.jsonl") for name in ("train", "in_domain", "sft"))
    held = {(json.dumps(row["prompt"]), row[side]) for row in in_domain for side in ("chosen", "rejected")}
    assert held
    assert not held & {(json.dumps(row["prompt"]), row[side]) for row in train for side in ("chosen", "rejected")}
    assert not held & {(json.dumps(row["prompt"]), row["completion"]) for row in sft}


def test_the_same_data_gives_the_same_files_and_other_data_is_refused(data_dir: Path, tmp_path: Path) -> None:
    for name in ("out", "again"):
        write_rmb_files(data_dir, tmp_path / name)
    assert all(
        path.read_bytes() == (tmp_path / "again" / path.name).read_bytes() for path in (tmp_path / "out").iterdir()
    )
    pq.write_table(pa.Table.from_pylist([pair(0)]), data_dir / "rmb_pairs.parquet")
    with pytest.raises(DataError, match="was made from another"):
        write_rmb_files(data_dir, tmp_path / "out")


def test_a_folder_without_the_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"no rmb_pairs.parquet in {tmp_path}"):
        write_rmb_files(tmp_path, tmp_path / "out")
