"""RMB's real preference pairs (rmb_pairs.parquet) as the files of a run: training pairs, the four scenarios, and text to pretrain on.

The split is the one that the data's own columns suggest: unseen prompts, and the mistral family as unseen response models, on at least one side of a pair.
In-domain pairs are of completions that training does not see, as the paper's are; the training pairs that would show one are left out and counted.
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
from rm_robust.runs.storage.commits import write_json_atomic, write_text_atomic

logger = logging.getLogger(__name__)

RMB_PAIRS = "rmb_pairs.parquet"
HELD_OUT_FRACTION = 0.13
"""Of the pairs of known prompts and models, for the in-domain set (as the data's README: 468 of 3,606)."""
_KEPT = ("pair_uid", "chosen", "rejected", "chosen_model", "rejected_model")


def write_rmb_files(data_dir: Path, folder: Path) -> None:
    """One file a scenario, and both answers of all training pairs as demonstrations. Raises DataError when `data_dir` has no such file, and
    when `folder` holds those of another."""
    source = data_dir / RMB_PAIRS
    if not source.is_file():
        raise DataError(f"There is no {RMB_PAIRS} in {data_dir}. Name the folder of real preference data: DATA=…")
    sha256, manifest = sha256_of(source), folder / "source.json"
    if manifest.exists():
        found = json.loads(manifest.read_text())["sha256"]
        if found != sha256:
            raise DataError(
                f"{folder} was made from another {RMB_PAIRS} ({found}, now {sha256}). Delete it, and the runs beside it."
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
    for name, own in files.items():
        write_text_atomic(folder / f"{name}.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in own))
    counts = {name: len(own) for name, own in files.items()}
    logger.info("%s: %d pairs, %d left out: %s; %s", RMB_PAIRS, len(rows), sum(left_out.values()), left_out, counts)
    write_json_atomic(manifest, {"sha256": sha256, "num_pairs": len(rows), **left_out, **counts})


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _scenarios_of(rows: list[dict[str, Any]]) -> Iterator[tuple[str | None, dict[str, Any]]]:
    """The scenario of every pair; None: it would show training a completion of the in-domain set."""
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
