"""Run the whole pipeline: SFT, pairs, BSR reward model, four scenarios, RLOO against the served scorers, report.

It is `rm-robust run`.
"""

import sys

from pipelines.command import main

if __name__ == "__main__":
    sys.exit(main(["run", *sys.argv[1:]]))
