"""Make the rows of a study that nobody ran, with the numbers that a test gives them."""

from collections.abc import Callable
from pathlib import Path

from research.study.grid import FULL, WORLDS, Cell, Plan, key_of
from research.study.rows import CURVES, HELD_OUT, NUM_CURVE_POINTS, RLOO_CURVES, RLOO_EVALUATION, TRAINING, Row
from rm_robust.data.scenarios import SCENARIOS

CONFIGS_DIR = Path("pipelines/configs").absolute()
Number = Callable[[Cell, int, str, str], float]
SEED_NOISE = (0.001, -0.001, 0.0005, -0.0005, 0.0)


def study(number: Number, plan: Plan = FULL) -> list[Row]:
    """Return every row of a study. Its figures are number(cell, epoch, set, metric) plus a little noise by seed."""
    rows = []
    for cell in plan.cells(WORLDS):
        noise = SEED_NOISE[(cell.seed + len(cell.variant)) % len(SEED_NOISE)]  # twins differ too
        if cell.part == "rloo":
            names = [f"{name.removeprefix('rloo/')}_last" for name in RLOO_CURVES] + [
                f"evaluation_{name}" for name in RLOO_EVALUATION
            ]
            names += ["gold_rise_first_half", "gold_rise_second_half", "num_overoptimised_steps"]
            figures = {name: number(cell, 3, "rloo", name) + noise for name in names}
            slope = number(cell, 3, "rloo", "slope") + noise
            curves = {name.removeprefix("rloo/"): [slope * step for step in range(20)] for name in RLOO_CURVES}
        else:
            figures = {
                f"{e}/{s}/{m}": number(cell, e, s, m) + noise
                for e in (1, 2, 3)
                for s in SCENARIOS
                for m in HELD_OUT
                if has(cell, s, m)
            }
            figures |= {f"{e}/train/{m}": number(cell, e, "train", m) + noise for e in (0, 1, 2, 3) for m in TRAINING}
            figures |= (
                {f"rm_bench/overall.{m}": number(cell, 3, "rm_bench", m) + noise for m in ("hard", "easy", "mean")}
                if cell.world == "rmb"
                else {}
            )
            curves = {name: [1.0 + 0.01 * point for point in range(NUM_CURVE_POINTS)] for name in CURVES}
        about: dict[str, str | int | float] = {
            "base_seconds": 100.0,
            "rmb_pairs.parquet_sha256": "a",
            "rm_bench.parquet_sha256": "b",
        }
        about |= {
            f"num_{name}{suffix}": 7 if suffix else 4000
            for name in ("train", *SCENARIOS)
            for suffix in ("", "_dropped")
        }
        key = key_of(cell, plan.config(cell, CONFIGS_DIR))
        rows.append(Row(key, cell.part, cell.world, cell.variant, cell.seed, 60.0, figures, curves, about))
    return rows


def has(cell: Cell, scenario: str, metric: str) -> bool:
    return metric != "kendall_tau_b" or (cell.world == "embedded" and scenario != "in_domain")


def as_the_paper_says(cell: Cell, epoch: int, where: str, metric: str) -> float:
    """Return numbers by which every claim holds by at least 0.1 for every seed.

    The head's norm is the exception: it stays.
    """
    is_bt, is_bsr = cell.variant == "bt", cell.variant.startswith("bsr")
    quality = {"bt": 0.5, "hinge": 0.5, "bt_dr": 0.1, "bt_norm": 0.0}.get(cell.variant, 0.7)
    strength = {"bsr_0.03": 0.0, "bsr_0.1": 0.1, "bsr_1": 0.2}.get(cell.variant, -0.2)
    known: dict[str, float] = {
        "head_norm": 1.0,
        "hidden_norm_mean": 12.0 if is_bt and where == "mutual_disjoint" else 10.0,
        "hidden_norm_std": 1.0 + epoch * (2.0 if is_bt else 0.1),
        "final_hidden_distance_mean": 1.0 + epoch,
        "final_hidden_distance_std": 1.0 + epoch,
        "final_hidden_distance_skewness": 1.0 + epoch,
        "brier": 0.3 if is_bt else 0.1,
        "effective_rank": 10.0 + (5.0 if is_bt and where == "mutual_disjoint" else 0.0),
        "slope": 0.2 if is_bt else 0.1,
        "mean": 0.7,
        "hard": 0.5 + strength,
        "easy": 0.8 - strength,
        "gold_rise_first_half": 0.5,
        "gold_rise_second_half": 0.3 if is_bsr else 0.0,
        "gold_score_mean_last": 0.9 if is_bsr else 0.6,
        "evaluation_length_controlled_win_rate": 0.8 if is_bsr else 0.6,
        "evaluation_completion_tokens_mean": 9.0 if is_bsr else 12.0,
    }
    agreement = quality + (0.1 * epoch if where == "in_domain" else -0.1 * epoch if is_bt else 0.0)
    return known.get(metric, agreement)
