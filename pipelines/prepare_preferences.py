"""Build and tokenise the preference pairs and the four scenarios: one stage of full_rlhf.py.

The run directory is that of the stages before it.
"""

import sys

from pipelines.driver import main
from pipelines.stages import PREFERENCES, WORLD

if __name__ == "__main__":
    sys.exit(main(__doc__, [WORLD, PREFERENCES]))
