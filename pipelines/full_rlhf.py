"""Run the whole pipeline: SFT, pairs, BSR reward model, four scenarios, RLOO against the served scorers, report."""

import sys

from pipelines.driver import main
from pipelines.stages import ALL_STAGES

if __name__ == "__main__":
    sys.exit(main(__doc__, ALL_STAGES))
