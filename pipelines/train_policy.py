"""RLOO against the served reward model and gold judge: one stage of full_rlhf.py, in the run directory of the stages before it."""

import sys

from pipelines.driver import main
from pipelines.stages import rloo_stage

if __name__ == "__main__":
    sys.exit(main(__doc__, [rloo_stage]))
