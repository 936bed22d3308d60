"""Run RLOO against the served reward model and gold judge: one stage of full_rlhf.py.

It is `rm-robust train-policy`.
"""

import sys

from pipelines.command import main

if __name__ == "__main__":
    sys.exit(main(["train-policy", *sys.argv[1:]]))
