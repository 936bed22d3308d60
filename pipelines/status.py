"""Show where runs stand: stages, steps, latest metrics, and the time left of a stage at its present pace.

The stages of a Bradley-Terry twin are shown as bt_twin/….

[DIR …]   run directories, or folders of them (default: where runs go, RM_ROBUST_RUN_ROOT or runs/)
--json    the same for programs
--watch   again every few seconds, until Ctrl-C

On a cluster, from anywhere: ray job submit --working-dir . -- python pipelines/status.py
"""

import argparse
import json
import sys
import time
from dataclasses import asdict

from pipelines.command import main as command
from rm_robust.errors import RmRobustError
from rm_robust.runs import files as run_files
from rm_robust.runs.directory import run_root
from rm_robust.runs.status import runs_in, status_lines, status_of

WATCH_EVERY_S = 5.0


def main(options: argparse.Namespace) -> int:
    """Print the status of the runs, and return the exit code.

    0: done; 2: an error that a user can correct, such as a folder without runs.
    """
    try:
        with run_files.read_only():
            folders = [run_files.locate(folder) for folder in options.folders] or [run_root()]
            while True:
                runs = {
                    run_dir: status_of(run_dir)
                    for folder in folders
                    for run_dir in runs_in(run_files.refresh_records(folder))
                }
                if options.json:
                    print(
                        json.dumps(
                            {
                                run_files.shown(run_dir): [asdict(stage) for stage in stages]
                                for run_dir, stages in runs.items()
                            },
                            indent=2,
                        )
                    )
                else:
                    print(
                        "\n".join(line for run_dir, stages in runs.items() for line in status_lines(run_dir, stages)),
                        flush=True,
                    )
                if not options.watch:
                    return 0
                time.sleep(WATCH_EVERY_S)
    except RmRobustError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 0


if __name__ == "__main__":
    sys.exit(command(["status", *sys.argv[1:]]))
