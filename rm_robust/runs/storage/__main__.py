"""Copy a committed folder out of an object store, for programs that do not know how a run lies there.

python -m rm_robust.runs.storage s3://bucket/runs/mine/checkpoints/policy DIR
"""

import argparse
import shutil
import sys
from pathlib import Path

from rm_robust.errors import CheckpointError, RmRobustError
from rm_robust.runs.storage.copies import copies_of_ones_own, local_path, reached, uri_of
from rm_robust.runs.storage.transfer import fetch_folder


def main(arguments: list[str] | None = None) -> int:
    """Return the exit code: 0, or 2 for a folder that cannot be copied."""
    parser = argparse.ArgumentParser(
        prog="python -m rm_robust.runs.storage", description="Copy a committed folder of a run out of an object store."
    )
    parser.add_argument("uri", help="s3://bucket/runs/mine/checkpoints/reward_model")
    parser.add_argument("folder", type=Path, help="a new folder")
    options = parser.parse_args(arguments)
    try:
        with copies_of_ones_own():
            copy = local_path(options.uri)
            with reached(copy):
                if uri_of(copy) is None or not fetch_folder(copy):
                    raise CheckpointError(f"{options.uri} is no committed folder in an object store.")
            shutil.copytree(copy, options.folder)
    except (RmRobustError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
