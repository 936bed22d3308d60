"""Supervised fine-tuning of the policy: one stage of full_rlhf.py, in the run directory of the stages before it."""

import sys

from pipelines.driver import main
from pipelines.stages import sft_stage, world_stage

if __name__ == "__main__":
    sys.exit(main(__doc__, [world_stage, sft_stage]))
