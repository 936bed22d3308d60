"""Preference pairs and the four scenarios, tokenised: one stage of full_rlhf.py, in the run directory of the stages before it."""

import sys

from rm_robust.stages import main, preferences_stage, world_stage

if __name__ == "__main__":
    sys.exit(main(__doc__, [world_stage, preferences_stage]))
