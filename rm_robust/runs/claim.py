"""One process at a time writes a run directory: a second one would train, commit and serve beside the first, into the
same files."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ray
from filelock import FileLock, Timeout
from ray._private.state import jobs
from ray.experimental.internal_kv import _internal_kv_get, _internal_kv_put

from rm_robust.errors import ClusterError, ConfigError
from rm_robust.runs.lock import lock_path, this_process
from rm_robust.runs.storage.copies import shown

NAMESPACE = "rm_robust_writers"
"""Namespace of the cluster's own key-value store that holds, for each run directory, the job that writes it."""


@contextlib.contextmanager
def only_writer(run_dir: Path) -> Iterator[None]:
    """Keep all other drivers away from `run_dir` while the body runs.

    The claim belongs to the job of a driver that is connected to a cluster, and to the process of one that starts a Ray
    of its own. It ends when the job or the process ends, however that happens. Raises ConfigError when another process
    of this machine holds the claim, ClusterError when another job of this cluster does. Two clusters, or a job and a
    local run on another machine, are not kept apart.
    """
    if ray.is_initialized():
        claim_for_job(run_dir)
    if ray.is_initialized() or "RAY_ADDRESS" in os.environ:  # the latter: a job whose stages are all done
        yield
    else:
        with _only_process(run_dir):
            yield


@contextlib.contextmanager
def _only_process(run_dir: Path) -> Iterator[None]:
    """Hold the lock file of the run directory, which says which process holds it."""
    run_dir.mkdir(parents=True, exist_ok=True)
    path = lock_path(run_dir)
    try:
        lock = FileLock(path, blocking=False).acquire()
    except Timeout as error:
        raise ConfigError(
            f"Another process writes the run directory {shown(run_dir)}: "
            f"{path.read_text().strip() or 'it has just begun'}. Wait for it or end it, or choose another directory "
            "with --run-dir."
        ) from error
    with lock:
        path.write_text(this_process())
        yield


def claim_for_job(run_dir: Path) -> None:
    """Claim the run directory for this job, until the job has ended.

    A driver that Ray started again keeps the claim of its job. The successor of each holder has a key of its own, which
    can be put once, so only one of two jobs that find the holder ended takes its place. Raises ClusterError when a job
    that has not ended holds the claim.
    """
    key, this_job = str(run_dir), ray.get_runtime_context().get_job_id()
    while True:
        _internal_kv_put(key, this_job, overwrite=False, namespace=NAMESPACE)
        holder = _internal_kv_get(key, namespace=NAMESPACE).decode()
        if holder == this_job:
            return
        living_holder = living_job(holder)
        if living_holder is not None:
            raise ClusterError(
                f"Another job writes the run directory {shown(run_dir)}: {living_holder['Entrypoint']} (job {holder}). "
                "Ctrl-C of `ray job submit` does not end a job: `ray job list` names it, `ray job stop` ends it; or "
                "wait for it, or choose another directory with --run-dir."
            )
        key = f"{run_dir} after job {holder}"


def living_job(job_id: str) -> dict[str, Any] | None:
    """Return the entry of a job in Ray's job table; None when the job has ended."""
    return next((job for job in jobs() if job["JobID"] == job_id and not job["IsDead"]), None)
