"""Preference pairs and the four scenarios, tokenised: one stage of full_rlhf.py, in the run directory of the stages before it."""

import sys

from pipelines.driver import main
from pipelines.stages import preferences_stage, world_stage

if __name__ == "__main__":
    sys.exit(main(__doc__, [world_stage, preferences_stage]))
