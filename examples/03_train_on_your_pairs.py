"""Train a reward model on preference pairs of your own, and score new text with it.

    .venv/bin/python examples/03_train_on_your_pairs.py

The script writes pairs and demonstrations to runs/own_pairs_data/, and runs the stages of a reward model with
03_train_on_your_pairs.toml. After a minute you see the share of held-out pairs that it ranks rightly, near 1, and two
scores: "Blue." is a colour and "Seven." is not. The run is in runs/own_pairs/; delete it to train again on other pairs.
"""

import json
import subprocess
import sys
from itertools import permutations
from pathlib import Path
from random import Random

from rm_robust import RewardModel

CONFIG = Path(__file__).with_suffix(".toml")
FOLDER = Path("runs/own_pairs_data")
WORDS = {
    "colour": ["Red", "Green", "Blue", "Brown", "White", "Black", "Pink", "Grey"],
    "number": ["One", "Two", "Three", "Four", "Five", "Six", "Seven", "Eight"],
    "fruit": ["Apple", "Pear", "Plum", "Peach", "Grape", "Melon", "Cherry", "Lemon"],
    "tool": ["Hammer", "Saw", "Knife", "Rope", "Axe", "Drill", "Spade", "Ladder"],
}

pairs = [
    {"prompt": f"Name a {kind}.", "chosen": f"{right}.", "rejected": f"{wrong}."}
    for kind, other in permutations(WORDS, 2)
    for right in WORDS[kind]
    for wrong in WORDS[other]
]
Random(0).shuffle(pairs)
demonstrations = [{"prompt": pair["prompt"], "completion": pair["chosen"]} for pair in pairs[:600]]
FOLDER.mkdir(parents=True, exist_ok=True)
for name, rows in (("train", pairs[:600]), ("held_out", pairs[600:]), ("demonstrations", demonstrations)):
    (FOLDER / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
subprocess.run([sys.executable, "-m", "pipelines.full_reward_model", "--config", str(CONFIG)], check=True)
print(RewardModel.load("runs/own_pairs").score("Name a colour.", ["Blue.", "Seven."]))
