"""Train the reward model: one stage of full_rlhf.py, in the run directory of the stages before it."""

import sys

from pipelines.driver import main
from pipelines.stages import BT_TWIN, REWARD_MODEL

if __name__ == "__main__":
    sys.exit(main(__doc__, [REWARD_MODEL, BT_TWIN]))
