"""Build and tokenise the preference pairs and the four scenarios: one stage of full_rlhf.py.

It is `rm-robust prepare-preferences`.
"""

import sys

from pipelines.command import main

if __name__ == "__main__":
    sys.exit(main(["prepare-preferences", *sys.argv[1:]]))
