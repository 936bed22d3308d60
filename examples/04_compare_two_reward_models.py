"""Compare two reward models on the same preferences: is the difference more than chance?

    .venv/bin/python examples/04_compare_two_reward_models.py [RUN_DIR] [OUT_DIR]

`make demo` makes the default run, runs/tiny_cpu, with a BSR reward model and its Bradley-Terry twin. The comparison
takes half a minute: both rank answers of models that they have not seen, to prompts that they have not seen. You see
the figures of the twin, then those of BSR. The lines below "minus checkpoint" are the differences, each with its 95 %
interval and its p-value. The same with pictures is in runs/comparison/bsr/report.html.
"""

import subprocess
import sys
from pathlib import Path

run_dir = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/tiny_cpu")
out_dir = Path(sys.argv[2] if len(sys.argv) > 2 else "runs/comparison")
data = run_dir / "preferences" / "scenarios" / "mutual_disjoint.jsonl"  # or pairs of your own
evaluate = [sys.executable, "-m", "pipelines.evaluate_reward_model", "--suite", "preferences", "--data", str(data)]
twin = ["--model", f"{run_dir}/bt_twin/checkpoints/reward_model", "--out", f"{out_dir}/bt"]
bsr = ["--model", f"{run_dir}/checkpoints/reward_model", "--out", f"{out_dir}/bsr", "--against", f"{out_dir}/bt"]
for options in (twin, bsr):
    subprocess.run(evaluate + options, check=True)
