"""Run `python -m pipelines …`, which is the console command `rm-robust …`."""

import sys

from pipelines.command import main

if __name__ == "__main__":
    sys.exit(main())
