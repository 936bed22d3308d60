"""Train the reward model: one stage of full_rlhf.py, in the run directory of the stages before it.

It is `rm-robust train-reward-model`.
"""

import sys

from pipelines.command import main

if __name__ == "__main__":
    sys.exit(main(["train-reward-model", *sys.argv[1:]]))
