"""Reward-model training: one stage of full_rlhf.py, in the run directory of the stages before it."""

import sys

from pipelines.driver import main
from pipelines.stages import bt_twin_stage, reward_model_stage

if __name__ == "__main__":
    sys.exit(main(__doc__, [reward_model_stage, bt_twin_stage]))
