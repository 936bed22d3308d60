"""Where runs stand: stages (those of a Bradley-Terry twin as bt_twin/…), steps, latest metrics, time left of a stage at its present pace.

[DIR …]   run directories, or folders of them (default: where runs go, RM_ROBUST_RUN_ROOT or runs/)
--json    the same for programs
--watch   again every few seconds, until Ctrl-C

On a cluster, from anywhere: ray job submit --working-dir . -- python pipelines/status.py
"""

import sys

from rm_robust.status_command import main

if __name__ == "__main__":
    sys.exit(main(__doc__))
