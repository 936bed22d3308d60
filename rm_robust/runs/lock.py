"""The lock file of a run directory, which says which process writes there."""

import os
import socket
from pathlib import Path

import psutil

from rm_robust.runs.storage.copies import LOCK

STARTED_BEFORE_S = 1.0
"""A process writes the file after its start; the clocks of a file system and of the processes may differ by this."""


def lock_path(run_dir: Path) -> Path:
    """Return the path of the lock file."""
    return run_dir / f".writer{LOCK}"


def this_process() -> str:
    """Return what the lock file says of its holder."""
    return f"process {os.getpid()} on {socket.gethostname()}\n"


def is_written(run_dir: Path) -> bool | None:
    """Return whether the process that the lock file names still runs.

    None where nothing is known: for a job of a cluster, which has no such file, and for a process of another machine.
    The lock itself is not touched, because a run that begins at this moment would be refused.
    """
    path = lock_path(run_dir)
    try:
        words, written_at_s = path.read_text().split(), path.stat().st_mtime
    except FileNotFoundError:
        return None
    if len(words) != 4 or words[3] != socket.gethostname():
        return None
    try:
        return bool(psutil.Process(int(words[1])).create_time() < written_at_s + STARTED_BEFORE_S)
    except psutil.NoSuchProcess:
        return False
