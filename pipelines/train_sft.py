"""Fine-tune the policy on demonstrations (SFT): one stage of full_rlhf.py.

It is `rm-robust train-sft`.
"""

import sys

from pipelines.command import main

if __name__ == "__main__":
    sys.exit(main(["train-sft", *sys.argv[1:]]))
