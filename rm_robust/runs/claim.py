"""One process at a time writes a run directory: a second one would train, commit and serve beside the first, into the same files."""

import contextlib
import fcntl
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ray
from ray._private.state import jobs
from ray.experimental.internal_kv import _internal_kv_get, _internal_kv_put

from rm_robust.errors import ClusterError, ConfigError
from rm_robust.runs.storage.copies import LOCK, shown

NAMESPACE = "rm_robust_writers"
"""Of the cluster's own key-value store: run directory -> the job that writes it."""


@contextlib.contextmanager
def only_writer(run_dir: Path) -> Iterator[None]:
    """Held while a driver works on `run_dir`: by its job where it is connected to a cluster, by the process where it is yet to start a Ray of its own.

    Whatever ends either ends that. Raises ConfigError where another process of this machine has it, ClusterError where another job of this cluster has.
    Two clusters, or a job and a local run on another machine, are not kept apart.
    """
    if ray.is_initialized():
        claim_for_job(run_dir)
    if ray.is_initialized() or "RAY_ADDRESS" in os.environ:  # or a job whose stages are all done
        yield
    else:
        with _only_process(run_dir):
            yield


@contextlib.contextmanager
def _only_process(run_dir: Path) -> Iterator[None]:
    run_dir.mkdir(parents=True, exist_ok=True)
    with (run_dir / f".writer{LOCK}").open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            lock.seek(0)
            raise ConfigError(
                f"Another process writes the run directory {shown(run_dir)}: {lock.read().strip() or 'it has just begun'}. "
                "Wait for it or end it, or choose another directory with --run-dir."
            ) from error
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        lock.flush()
        yield


def claim_for_job(run_dir: Path) -> None:
    """For this job, until it has ended. Raises ClusterError when a job that has not ended has it; a driver that Ray started again has its job's own.

    Each holder's successor has a key of its own, which is put once: of two jobs that find the holder ended, one takes its place.
    """
    key, own = str(run_dir), ray.get_runtime_context().get_job_id()
    while True:
        _internal_kv_put(key, own, overwrite=False, namespace=NAMESPACE)
        holder = _internal_kv_get(key, namespace=NAMESPACE).decode()
        if holder == own:
            return
        at_work = living_job(holder)
        if at_work is not None:
            raise ClusterError(
                f"Another job writes the run directory {shown(run_dir)}: {at_work['Entrypoint']} (job {holder}). Ctrl-C of `ray job submit` does not end a "
                "job: `ray job list` names it, `ray job stop` ends it; or wait for it, or choose another directory with --run-dir."
            )
        key = f"{run_dir} after job {holder}"


def living_job(job_id: str) -> dict[str, Any] | None:
    """What Ray's job table has of a job that has not ended; None when it has."""
    return next((job for job in jobs() if job["JobID"] == job_id and not job["IsDead"]), None)
