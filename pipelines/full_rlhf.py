"""The whole pipeline: SFT, preference pairs, BSR reward model, four scenarios, RLOO against the served reward model and gold judge, report."""

import sys

from rm_robust.stages import ALL_STAGES, main

if __name__ == "__main__":
    sys.exit(main(__doc__, ALL_STAGES))
