"""Reward-model training: one stage of full_rlhf.py, in the run directory of the stages before it."""

import sys

from rm_robust.stages import bt_twin_stage, main, reward_model_stage

if __name__ == "__main__":
    sys.exit(main(__doc__, [reward_model_stage, bt_twin_stage]))
