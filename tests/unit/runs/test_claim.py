"""Two drivers never write one run directory. A driver that ends, however that happens, leaves it free."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from rm_robust.errors import ClusterError, ConfigError
from rm_robust.runs import claim
from rm_robust.runs.claim import claim_for_job, only_writer

HOLD = """
import sys, time
from pathlib import Path
from rm_robust.runs.claim import only_writer
with only_writer(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture(autouse=True)
def no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


def test_another_process_is_refused_by_name_until_the_first_is_killed(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with (
            pytest.raises(ConfigError, match=f"process {holder.pid} on .*choose another directory with --run-dir"),
            only_writer(tmp_path / "run"),
        ):
            pass
        with only_writer(tmp_path / "other"):
            pass
        os.kill(holder.pid, signal.SIGKILL)
    with only_writer(tmp_path / "run"):
        pass


def test_a_process_may_take_it_again(tmp_path: Path) -> None:
    for _ in range(2):
        with only_writer(tmp_path):
            pass


@pytest.fixture
def as_job(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Return a function that makes this process a driver of the named job. The job "05" has ended."""
    store: dict[str, bytes] = {}

    def put(key: str, value: str, overwrite: bool = True, *, namespace: str) -> None:
        if overwrite or key not in store:
            store[key] = value.encode()

    table = [{"JobID": job, "IsDead": job == "05", "Entrypoint": f"python run.py {job}"} for job in ("05", "06", "07")]
    monkeypatch.setattr(claim, "_internal_kv_put", put)
    monkeypatch.setattr(claim, "_internal_kv_get", lambda key, *, namespace: store[key])
    monkeypatch.setattr(claim, "jobs", lambda: table)

    def become(job: str) -> None:
        monkeypatch.setattr(
            claim.ray, "get_runtime_context", lambda: type("Context", (), {"get_job_id": lambda self: job})()
        )

    return become


def test_a_job_has_it_until_it_ends(as_job: Callable[[str], None], tmp_path: Path) -> None:
    for job in ("05", "06", "06"):  # 05 has ended; the driver of 06 is started again
        as_job(job)
        claim_for_job(tmp_path)
    as_job("07")
    with pytest.raises(ClusterError, match=r"python run.py 06 \(job 06\).*`ray job stop` ends it"):
        claim_for_job(tmp_path)
    claim_for_job(tmp_path / "other")


def test_of_two_jobs_that_find_the_holder_ended_one_takes_its_place(
    as_job: Callable[[str], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    as_job("05")
    claim_for_job(tmp_path)
    table = claim.jobs()

    def sees_the_table_late() -> list[dict[str, object]]:
        """Let job 06 make its claim after job 07 has read who the holder is."""
        monkeypatch.setattr(claim, "jobs", lambda: table)
        as_job("06")
        claim_for_job(tmp_path)
        return table

    as_job("07")
    monkeypatch.setattr(claim, "jobs", sees_the_table_late)
    with pytest.raises(ClusterError, match=r"python run.py 06 \(job 06\)"):
        claim_for_job(tmp_path)
