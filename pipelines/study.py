"""The paper's claims re-tested: reward models of several objectives, seeds and worlds, RLOO against two of them, docs/STUDY.md.

The same command again runs only what has no row in docs/study/results.jsonl yet, and changes nothing when there is none.
"""

import sys

from rm_robust.study.command import main

if __name__ == "__main__":
    sys.exit(main(str(__doc__)))
