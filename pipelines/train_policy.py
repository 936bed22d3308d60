"""Run RLOO against the served reward model and gold judge: one stage of full_rlhf.py.

The run directory is that of the stages before it.
"""

import sys

from pipelines.driver import main
from pipelines.stages import RLOO

if __name__ == "__main__":
    sys.exit(main(__doc__, [RLOO]))
