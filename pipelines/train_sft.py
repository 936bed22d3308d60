"""Fine-tune the policy on demonstrations (SFT): one stage of full_rlhf.py."""

import sys

from pipelines.driver import main
from pipelines.stages import SFT, WORLD

if __name__ == "__main__":
    sys.exit(main(__doc__, [WORLD, SFT]))
