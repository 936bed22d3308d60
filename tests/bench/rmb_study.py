"""Bradley-Terry and BSR on RMB's real preference pairs: one SFT model, two reward models, the four scenarios (accuracy: these are pairs).

    python -m tests.bench.rmb_study --data ../shared/data        (make study-rmb)

Writes runs/rmb_study/data, then runs pipelines/full_reward_model.py into runs/rmb_study/bt and runs/rmb_study/bsr, each with a report.html of its
training curves. The same command again resumes. The last line is JSON.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pyarrow.parquet as pq

from tests.bench.shared_stages import share_stages

CONFIG = "pipelines/configs/rmb_study.toml"
STUDY_DIR = Path("runs/rmb_study")
OBJECTIVES = ("bt", "bsr")
HELD_OUT_FRACTION = 0.13
"""Of the training pairs, for the in-domain set (as the data's README: 468 of 3,606)."""
SCENARIOS = ("in_domain", "prompt_disjoint", "response_disjoint", "mutual_disjoint")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of rmb_pairs.parquet")
    parser.add_argument("--set", action="append", default=[], help="further overrides for both runs")
    arguments = parser.parse_args()
    source = arguments.data / "rmb_pairs.parquet"
    if not source.is_file():
        sys.exit(f"study-rmb: there is no {source}. Name the folder that holds it: make study-rmb DATA=…")
    write_files(pq.read_table(source).to_pylist(), STUDY_DIR / "data")
    results: dict[str, dict[str, float]] = {}
    for objective in OBJECTIVES:
        run_dir = STUDY_DIR / objective
        if objective != OBJECTIVES[0]:  # both grow from one model
            share_stages(STUDY_DIR / OBJECTIVES[0], run_dir, ["sft"])
        overrides = [f"--set={override}" for override in [f"reward_model.objective={objective}", *arguments.set]]
        subprocess.run([sys.executable, "pipelines/full_reward_model.py", "--config", CONFIG, "--run-dir", str(run_dir), *overrides], check=True)
        table = json.loads((run_dir / "evaluation.json").read_text())
        results[objective] = {name: table[name]["value"] for name in SCENARIOS}
    print("\n| accuracy | " + " | ".join(name.replace("_", "-") for name in SCENARIOS) + " |\n| --- " + "| --- " * len(SCENARIOS) + "|")
    for objective, values in results.items():
        print(f"| {objective} | " + " | ".join(f"{values[name]:.3f}" for name in SCENARIOS) + " |")
    print(f"training curves: {', '.join(str(STUDY_DIR / objective / 'report.html') for objective in OBJECTIVES)}")
    print(json.dumps({"study": "rmb", "results": results}))


def scenarios_of(rows: list[dict[str, Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The split that the data suggests: unseen prompts, and the mistral family as unseen response models."""
    rng = Random(0)
    for row in rows:
        is_unseen_prompt, is_unseen_model = row["prompt_split"] == "unseen", row["n_unseen_models"] > 0
        name = {(True, True): "mutual_disjoint", (True, False): "prompt_disjoint", (False, True): "response_disjoint"}.get((is_unseen_prompt, is_unseen_model))
        name = name or ("in_domain" if rng.random() < HELD_OUT_FRACTION else "train")
        kept = {key: row[key] for key in ("pair_uid", "chosen", "rejected", "chosen_model", "rejected_model")}
        yield name, {**kept, "prompt": row["messages"]}


def write_files(rows: list[dict[str, Any]], folder: Path) -> None:
    """One file a scenario, and demonstrations from the chosen answers of the training pairs. The same rows give the same bytes."""
    files: dict[str, list[dict[str, Any]]] = {name: [] for name in ("train", *SCENARIOS, "sft")}
    for name, row in scenarios_of(rows):
        if row["prompt"][-1]["content"].strip():
            files[name].append(row)
    num_empty = len(rows) - sum(map(len, files.values()))
    print(f"{len(rows)} pairs, {num_empty} with an empty last user turn left out")
    demonstrations = {(json.dumps(row["prompt"]), row["chosen"]) for row in files["train"]}
    files["sft"] = [{"prompt": json.loads(prompt), "completion": chosen} for prompt, chosen in sorted(demonstrations)]
    folder.mkdir(parents=True, exist_ok=True)
    for name, own in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in own), encoding="utf-8")
        print(f"  {name}: {len(own)} rows")


if __name__ == "__main__":
    main()
