"""Write RMB's real preference pairs (rmb_pairs.parquet) as the files of a run.

The files hold training pairs, the four scenarios, and text to pretrain on.

The data's own columns give the split: unseen prompts, and the mistral family as unseen response models on at least one
side of a pair. As in the paper, training sees no completion of an in-domain pair. Training pairs that would show such a
completion are left out and counted.
"""

import hashlib
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pyarrow.parquet as pq

from rm_robust.data.scenarios import SCENARIOS
from rm_robust.errors import DataError
from rm_robust.runs import files as run_files

logger = logging.getLogger(__name__)

RMB_PAIRS = "rmb_pairs.parquet"
HELD_OUT_FRACTION = 0.13
"""The fraction of the pairs with known prompts and models that forms the in-domain set.

The data's README holds out the same fraction: 468 of 3,606.
"""
_KEPT = ("pair_uid", "chosen", "rejected", "chosen_model", "rejected_model")


def write_rmb_files(data_dir: Path, folder: Path) -> None:
    """Write one file for each scenario, and both answers of all training pairs as demonstrations.

    Raises DataError if `data_dir` has no rmb_pairs.parquet, and if `folder` was made from a different one.
    """
    source = data_dir / RMB_PAIRS
    if not source.is_file():
        raise DataError(f"There is no {RMB_PAIRS} in {data_dir}. Name the folder of real preference data: DATA=…")
    sha256, manifest = sha256_of(source), folder / "source.json"
    if manifest.exists():
        earlier_sha256 = json.loads(manifest.read_text())["sha256"]
        if earlier_sha256 != sha256:
            raise DataError(
                f"{folder} was made from another {RMB_PAIRS} ({earlier_sha256}, now {sha256}). "
                "Delete the folder and the runs beside it."
            )
        return
    files: dict[str, list[dict[str, Any]]] = {name: [] for name in ("train", *SCENARIOS, "sft")}
    left_out = {"empty_last_turn": 0, "shares_a_completion_with_in_domain": 0}
    rows = pq.read_table(source).to_pylist()
    for name, row in _scenarios_of(rows):
        if not row["prompt"][-1]["content"].strip():
            left_out["empty_last_turn"] += 1
        elif name is None:
            left_out["shares_a_completion_with_in_domain"] += 1
        else:
            files[name].append(row)
    demonstrations = {
        (json.dumps(row["prompt"]), row[side]) for row in files["train"] for side in ("chosen", "rejected")
    }
    files["sft"] = [
        {"prompt": json.loads(prompt), "completion": completion} for prompt, completion in sorted(demonstrations)
    ]
    folder.mkdir(parents=True, exist_ok=True)
    for name, file_rows in files.items():
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in file_rows)
        run_files.write_text(folder / f"{name}.jsonl", "".join(lines))
    counts = {name: len(file_rows) for name, file_rows in files.items()}
    logger.info("%s: %d pairs, %d left out: %s; %s", RMB_PAIRS, len(rows), sum(left_out.values()), left_out, counts)
    run_files.write_json(manifest, {"sha256": sha256, "num_pairs": len(rows), **left_out, **counts})


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _scenarios_of(rows: list[dict[str, Any]]) -> Iterator[tuple[str | None, dict[str, Any]]]:
    """Yield every pair with its scenario, or with None if training on it would show an in-domain completion."""
    rng = Random(0)
    known = [row for row in rows if row["prompt_split"] != "unseen" and row["n_unseen_models"] == 0]
    held_out = {row["pair_uid"] for row in known if rng.random() < HELD_OUT_FRACTION}
    held_completions = {
        (row["prompt_id"], row[side]) for row in known if row["pair_uid"] in held_out for side in ("chosen", "rejected")
    }
    for row in rows:
        is_unseen_prompt, is_unseen_model = row["prompt_split"] == "unseen", row["n_unseen_models"] > 0
        name = {
            (True, True): "mutual_disjoint",
            (True, False): "prompt_disjoint",
            (False, True): "response_disjoint",
        }.get((is_unseen_prompt, is_unseen_model))
        if name is None:
            overlaps = any((row["prompt_id"], row[side]) in held_completions for side in ("chosen", "rejected"))
            name = "in_domain" if row["pair_uid"] in held_out else None if overlaps else "train"
        yield name, {**{key: row[key] for key in _KEPT}, "prompt": row["messages"]}
