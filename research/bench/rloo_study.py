"""Study RLOO on the embedded world, where the gold score is known.

    python -m research.bench.rloo_study        (make study-rloo)

The study asks whether stale samples cost anything, and whether the monitor distinguishes over-optimisation from
learning. It runs pipelines/full_rlhf.py into runs/rloo_study/<setting>_<seed>, and each run has its report.html. Stages
that two settings share are done once, so the settings differ in RLOO alone (weak_bt also in the reward model). A
repeated command resumes. The last line is JSON.

    bsr_kl      BSR, KL, on-policy: the default config except for the reward model's training (COMMON)
    lag_1       the same with samples from the policy before the latest update
    lag_4       the same with samples four updates old and without importance correction, for a few steps:
                it measures how far the sampler is from the policy
    weak_bt     Bradley-Terry, a 16th of the training steps, no KL: made to be over-optimised
"""

import argparse
import json
import math
import subprocess
import sys
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from rm_robust.runs.layout import RunLayout, share_stages
from rm_robust.runs.metrics import read_metrics

STUDY_DIR = Path("runs/rloo_study")
UP_TO_PREFERENCES = ["world", "sft", "preferences"]
UP_TO_EVALUATION = [*UP_TO_PREFERENCES, "reward_model", "evaluation"]
SETTINGS: dict[str, tuple[list[str], list[str]]] = {
    "bsr_kl": ([], []),
    "lag_1": (UP_TO_EVALUATION, ["rloo.max_policy_lag=1"]),
    "lag_4": (
        UP_TO_EVALUATION,
        [
            "rloo.max_policy_lag=4",
            'rloo.importance_correction="none"',
            "rloo.num_steps=12",
            "rloo.evaluation.every_steps=0",
        ],
    ),
    "weak_bt": (
        UP_TO_PREFERENCES,
        ['reward_model.objective="bt"', "reward_model.num_epochs=0.1875", "rloo.kl_coefficient=0.0"],
    ),
}
"""The stages that a setting takes from the seed's bsr_kl run, and its overrides."""
COMMON = ["world.num_training_prompts=16000", "reward_model.num_epochs=3", "reward_model.bt_twin=false"]
"""The overrides of all settings: the reward model trains longer than the demo's ten minutes allow, and has no twin."""
LAG_4_SEEDS = 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="default: 0 1 2")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS), help="default: all")
    arguments = parser.parse_args()
    runs: dict[str, dict[int, Path]] = {name: {} for name in arguments.settings}
    for name in arguments.settings:
        for seed in arguments.seeds[: LAG_4_SEEDS if name == "lag_4" else None]:
            runs[name][seed] = run(name, seed)
    print(f"\n| setting | seed | {' | '.join(COLUMNS)} |\n" + "| --- " * (2 + len(COLUMNS)) + "|")
    rows = {name: {seed: figures(run_dir) for seed, run_dir in by_seed.items()} for name, by_seed in runs.items()}
    for name, by_seed in rows.items():
        for seed, row in by_seed.items():
            print(
                f"| {name} | {seed} | "
                + " | ".join("-" if row[column] is None else f"{row[column]:.4g}" for column in COLUMNS)
                + " |"
            )
    print(json.dumps({"study": "rloo", **conclusions(rows), "rows": rows}))


def run(name: str, seed: int) -> Path:
    shared, overrides = SETTINGS[name]
    run_dir = STUDY_DIR / f"{name}_{seed}"
    if shared:
        share_stages(STUDY_DIR / f"bsr_kl_{seed}", run_dir, shared)
    flags = [f"--set={override}" for override in (f"seed={seed}", *COMMON, *overrides)]
    subprocess.run([sys.executable, "pipelines/full_rlhf.py", "--run-dir", str(run_dir), *flags], check=True)
    return run_dir


COLUMNS = (
    "gold_gain",
    "gold_last",
    "proxy_last",
    "kl_last",
    "sampler_kl",
    "overoptimised_steps",
    "first_overoptimised",
    "win_rate",
    "step_s",
)


def figures(run_dir: Path) -> dict[str, float | None]:
    """Return the figures of one run.

    `gold_gain` is in standard deviations. `…_last` are means over the last tenth of the steps. `sampler_kl` is the KL
    per token from sampler to trainer, after the lag is reached.
    """
    summary: dict[str, Any] = json.loads(RunLayout(run_dir).summary.read_text())["rloo"]
    lines: list[dict[str, Any]] = list(read_metrics(run_dir, "rloo"))
    last = lines[-max(1, len(lines) // 10) :]
    overoptimised = summary["overoptimised_steps"]
    evaluation = summary["last_evaluation"]
    return {
        "gold_gain": summary["gold_gain"],
        "gold_last": fmean(line["rloo/gold_score_mean"] for line in last),
        "proxy_last": fmean(line["rloo/proxy_score_mean"] for line in last),
        "kl_last": fmean(line["rloo/kl_mean"] for line in last),
        "sampler_kl": fmean(line["rloo/sampler_kl_mean"] for line in lines[5:]),
        "overoptimised_steps": len(overoptimised),
        "first_overoptimised": overoptimised[0] if overoptimised else None,
        "win_rate": evaluation["win_rate"] if evaluation else None,
        "step_s": fmean(line["time/step_s"] for line in lines),
    }


def conclusions(rows: dict[str, dict[int, dict[str, Any]]]) -> dict[str, Any]:
    """Return the comparisons between those settings that were run."""
    results: dict[str, Any] = {}
    if len(rows.get("lag_1", {})) > 1 and rows.get("bsr_kl"):
        without, with_lag = ([rows[name][seed]["gold_last"] for seed in rows["lag_1"]] for name in ("bsr_kl", "lag_1"))
        differences = [lagged - on_policy for lagged, on_policy in zip(with_lag, without, strict=True)]
        results["lag_1_gold_difference"] = fmean(differences)
        results["lag_1_gold_difference_se"] = stdev(differences) / math.sqrt(len(differences))
        results["lag_1_gold_difference_between_seeds_se"] = math.sqrt(
            (stdev(without) ** 2 + stdev(with_lag) ** 2) / len(differences)
        )
    if rows.get("lag_4") and rows.get("bsr_kl"):
        results["lag_4_sampler_kl_ratio"] = fmean(row["sampler_kl"] for row in rows["lag_4"].values()) / fmean(
            row["sampler_kl"] for row in rows["bsr_kl"].values()
        )
    for name in ("bsr_kl", "weak_bt"):
        if name in rows:
            results[f"{name}_fired"] = {seed: row["overoptimised_steps"] > 0 for seed, row in rows[name].items()}
    return results


if __name__ == "__main__":
    main()
