"""Run everything up to the reward model's four-scenario table, and the report: full_rlhf.py without its policy.

It is `rm-robust run-reward-model`.
"""

import sys

from pipelines.command import main

if __name__ == "__main__":
    sys.exit(main(["run-reward-model", *sys.argv[1:]]))
