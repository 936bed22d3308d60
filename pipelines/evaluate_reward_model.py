"""The four-scenario table of the reward model: one stage of full_rlhf.py, in the run directory of the stages before it."""

import sys

from rm_robust.stages import evaluation_stage, main

if __name__ == "__main__":
    sys.exit(main(__doc__, [evaluation_stage]))
