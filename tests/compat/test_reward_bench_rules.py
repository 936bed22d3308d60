"""Our RewardBench figures equal those of reward-bench 0.1.4's own functions on random scores (make test-compat).

These functions run in their own environment.
"""

import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rm_robust.evaluation.evaluate import figures_of
from rm_robust.evaluation.reward_bench import SECTION_OF
from rm_robust.evaluation.suites import SUITES
from tests.compat.test_reward_bench import BIN, run

NUM_ROWS = 400
NUM_TIES = 40
EXACT = 1e-12
THEIRS = """
import json, sys
import numpy as np
from datasets import Dataset
from rewardbench.constants import EXAMPLE_COUNTS, SUBSET_MAPPING
from rewardbench.utils import calculate_scores_per_section, process_single_model, reroll_and_score_dataset
given = json.load(open(sys.argv[1]))
subsets = sorted({row["subset"] for row in given["pairs"]})
def accuracy(subset):
    return float(np.mean([r["scores"][0] > r["scores"][1] for r in given["pairs"] if r["subset"] == subset]))
metrics = {s: accuracy(s) for s in subsets}
flat = [
    {"text": "", "scores": score, "id": r["id"], "subset": r["subset"]}
    for r in given["best_of"]
    for score in r["scores"]
]
rolled = reroll_and_score_dataset(Dataset.from_list(flat), [len(r["scores"]) for r in given["best_of"]])
best_of = {s: float(np.mean([r["results"] for r in rolled if r["subset"] == s])) for s in set(rolled["subset"])}
ties = [{"id": r["id"], "scores": r["scores"], "num_correct": r["num_right"]} for r in given["ties"]]
print(json.dumps({
    "subsets": metrics,
    "sections": calculate_scores_per_section(EXAMPLE_COUNTS, SUBSET_MAPPING, metrics),
    "best_of": best_of,
    "ties": float(process_single_model(Dataset.from_list(ties))[1]),
}))
"""


def score(rng: random.Random) -> float:
    """Return a random score, so coarse that some scores are equal."""
    return rng.randint(-8, 8) / 4


def figures(
    suite: str, rows: list[dict[str, Any]], texts: Callable[[dict[str, Any]], dict[str, Any]]
) -> dict[str, float]:
    cases = []
    for row in rows:
        case = SUITES[suite].parse(
            {"id": row["id"], "subset": row["subset"], "prompt": f"Prompt {row['id']}."} | texts(row)
        )
        cases.append(replace(case, own_id=row["id"]))
    suite_figures = figures_of(SUITES[suite], cases, [row["scores"] for row in rows])
    return {name: figure.value for name, figure in suite_figures.items()}


@pytest.mark.timeout(300)
def test_reward_benchs_own_functions_give_our_figures(tmp_path: Path) -> None:
    rng = random.Random(0)
    pairs = [
        {"id": str(i), "subset": rng.choice(list(SECTION_OF)), "scores": [score(rng), score(rng)]}
        for i in range(NUM_ROWS)
    ]
    best_of = [
        {"id": str(i), "subset": rng.choice(["Factuality", "Math", "Focus"]), "scores": [score(rng) for _ in range(4)]}
        for i in range(NUM_ROWS)
    ]
    ties: list[dict[str, Any]] = []
    for number in range(NUM_TIES):  # the gap to the wrong answers is sometimes smaller than the right ones' spread
        gap = rng.choice([0.5, 2.0, 6.0])
        for kind, num_right, num_wrong in (("ref", 1, 3), ("tied", rng.randint(1, 5), rng.randint(1, 4))):
            scores = [score(rng) + gap for _ in range(num_right)] + [score(rng) - gap for _ in range(num_wrong)]
            ties.append({"id": f"{kind}:{number}", "subset": "Ties", "num_right": num_right, "scores": scores})
    given = tmp_path / "given.json"
    given.write_text(json.dumps({"pairs": pairs, "best_of": best_of, "ties": ties}))
    theirs = json.loads(run(str(BIN / "python"), "-c", THEIRS, str(given), folder=tmp_path).splitlines()[-1])

    ours = figures("reward_bench", pairs, lambda _: {"chosen": "yes", "rejected": "no"})
    for name, value in (theirs["subsets"] | theirs["sections"]).items():
        assert ours[f"{name}.accuracy"] == pytest.approx(value, rel=EXACT)
    assert ours["overall.accuracy"] == pytest.approx(sum(theirs["sections"].values()) / 4, rel=EXACT)
    lists = figures("reward_bench_2", best_of, lambda _: {"chosen": ["yes"], "rejected": ["no"] * 3})
    for name, value in theirs["best_of"].items():
        assert lists[f"{name}.accuracy"] == pytest.approx(value, rel=EXACT)
    tied = figures(
        "reward_bench_2",
        ties,
        lambda row: {
            "chosen": ["yes"] * row["num_right"],
            "rejected": ["no"] * (len(row["scores"]) - row["num_right"]),
        },
    )
    assert tied["Ties.accuracy"] == pytest.approx(theirs["ties"], rel=EXACT)
    assert 0.2 < theirs["ties"] < 0.9  # the case is not a trivial one
