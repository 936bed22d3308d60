"""Run closed-loop HTTP clients in a process of their own.

A client sends its next bodies when its last ones are answered.

    scoring.py ─pickled LoadJob─► stdin │ load_client │ stdout ─pickled LoadResult─► scoring.py

While the clock runs, the process only sends bytes that are ready and keeps the bytes that come back. Just before and
just after, it also reads how much CPU time every server has used.
"""

import asyncio
import pickle
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self

import aiohttp
import psutil

TIMEOUT_S = 120


@dataclass(frozen=True)
class LoadJob:
    """The requests of one measurement.

    One client sends all bodies of an inner list at the same time, and takes the next list when all are answered.
    """

    url: str
    headers: dict[str, str]
    warm_up: list[list[bytes]]
    """Bodies that the same clients send first. They are neither timed nor kept."""
    work: list[list[bytes]]
    num_clients: int
    process_ids: list[int]
    """The first process of each server that runs."""


@dataclass(frozen=True)
class LoadResult:
    """The result of one measurement. `replies` and `latencies_s` have the shape of the job's `work`."""

    seconds: float
    replies: list[list[bytes]]
    latencies_s: list[list[float]]
    client_cpu_s: float
    server_cpu_s: dict[int, float]
    """The CPU seconds that each server used meanwhile, all its processes together, by the id of its first process."""


class LoadClient:
    """The parent's end of the client process, which is idle until `run`."""

    def __enter__(self) -> Self:
        # Do not use `-m`: the module would be __main__, and would pickle its classes under that name.
        command = [sys.executable, "-c", "from research.bench.load_client import main; main()"]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()

    def run(self, job: LoadJob) -> LoadResult:
        """Do the job and return its result. Raises EOFError if a request failed; stderr then says why."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        pickle.dump(job, self._process.stdin)
        self._process.stdin.flush()
        result: LoadResult = pickle.load(self._process.stdout)
        return result


def main() -> None:
    while True:
        try:
            job = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        result = asyncio.run(run_job(job))
        pickle.dump(result, sys.stdout.buffer)
        sys.stdout.buffer.flush()


async def run_job(job: LoadJob) -> LoadResult:
    """Do the job and return its result. Raises RuntimeError for a reply whose status is not 200."""
    await send_all(job, job.warm_up)
    before = {process_id: cpu_seconds(process_id) for process_id in job.process_ids}
    started_s, cpu_started_s = time.perf_counter(), time.process_time()
    answered = await send_all(job, job.work)
    seconds, client_cpu_s = time.perf_counter() - started_s, time.process_time() - cpu_started_s
    after = {process_id: cpu_seconds(process_id) for process_id in job.process_ids}
    return LoadResult(
        seconds,
        [[reply for reply, _ in group] for group in answered],
        [[latency_s for _, latency_s in group] for group in answered],
        client_cpu_s,
        {process_id: after[process_id] - before[process_id] for process_id in before},
    )


async def send_all(job: LoadJob, groups: list[list[bytes]]) -> list[list[tuple[bytes, float]]]:
    """Send all groups over new connections, and return the replies with their latencies.

    The connections stay open. They are new for every call, because uvicorn closes a connection that is idle for 5 s, as
    happens between a slow warm-up and the work.
    """
    answered: list[list[tuple[bytes, float]]] = [[] for _ in groups]
    numbers = iter(range(len(groups)))
    connector, timeout = aiohttp.TCPConnector(limit=0), aiohttp.ClientTimeout(TIMEOUT_S)
    async with (
        aiohttp.ClientSession(connector=connector, headers=job.headers, timeout=timeout) as session,
        asyncio.TaskGroup() as clients,
    ):
        for _ in range(job.num_clients):
            clients.create_task(one_client(session, job.url, groups, numbers, answered))
    return answered


async def one_client(
    session: aiohttp.ClientSession,
    url: str,
    groups: list[list[bytes]],
    numbers: Iterator[int],
    answered: list[list[tuple[bytes, float]]],
) -> None:
    for number in numbers:
        bodies = groups[number]
        answered[number] = (
            [await send(session, url, bodies[0])]
            if len(bodies) == 1
            else await asyncio.gather(*(send(session, url, body) for body in bodies))
        )


async def send(session: aiohttp.ClientSession, url: str, body: bytes) -> tuple[bytes, float]:
    """Return the reply, and the seconds until its last byte arrived."""
    started_s = time.perf_counter()
    async with session.post(url, data=body) as response:
        reply = await response.read()
    latency_s = time.perf_counter() - started_s
    if response.status != 200:
        raise RuntimeError(f"{url} answered {response.status}: {reply[:500]!r}")
    return reply, latency_s


def cpu_seconds(process_id: int) -> float:
    """Return the CPU seconds of a process and all its descendants.

    A descendant that has ended counts too, if its parent has waited for it.
    """
    root = psutil.Process(process_id)
    total = 0.0
    for process in (root, *root.children(recursive=True)):
        try:
            total += sum(process.cpu_times()[:4])  # user and system time, of it and of its children that have ended
        except psutil.NoSuchProcess:
            continue
    return total
