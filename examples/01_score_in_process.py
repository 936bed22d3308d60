"""Score completions with the reward model of a run, in this process.

    .venv/bin/python examples/01_score_in_process.py [RUN_DIR]

`make demo` makes the default run, runs/tiny_cpu, in about 5 minutes; the script itself takes seconds. You see four
answers to one question, the highest score first. A score has no unit: it ranks the answers to one prompt.
"""

import sys

from rm_robust import RewardModel

PROMPT = "Today Mia bought a brown pear. Please tell me only the thing."
COMPLETIONS = ["The answer is pear.", "Pear, pear, pear!", "I love this question! The answer is pear.", "It is brown."]

run_dir = sys.argv[1] if len(sys.argv) > 1 else "runs/tiny_cpu"
reward_model = RewardModel.load(run_dir)  # or a checkpoint, an adopted model, s3://bucket/runs/mine
scores = reward_model.score(PROMPT, COMPLETIONS)
for score, completion in sorted(zip(scores, COMPLETIONS, strict=True), reverse=True):
    print(f"{score:8.3f}  {completion}")
