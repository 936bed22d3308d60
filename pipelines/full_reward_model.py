"""Run everything up to the reward model's four-scenario table, and the report: full_rlhf.py without its policy."""

import sys

from pipelines.driver import main
from pipelines.stages import REWARD_MODEL_STAGES

if __name__ == "__main__":
    sys.exit(main(__doc__, REWARD_MODEL_STAGES))
