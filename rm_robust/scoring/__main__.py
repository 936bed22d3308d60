"""Run `python -m rm_robust.scoring score …`: score a jsonl file with a served reward model."""

import sys

from rm_robust.scoring.files import main

if __name__ == "__main__":
    sys.exit(main())
