"""Test `python -m serve` under a mixed load.

Meanwhile a replica is killed, another hangs, and the checkpoint is swapped. No reply is lost, wrong, or a 5xx.

pytest -s tests/component/test_serve_mixed_load.py --load-seconds 600
"""

import asyncio
import os
import signal
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import httpx
import numpy as np
import pytest

from rm_robust.models.checkpoint import read_manifest
from rm_robust.scoring.contract import ScoreInput
from tests.e2e.pipeline_process import wait_until
from tests.support.http_load import Reply, metric, post, score_body
from tests.support.plain_transformers import PlainTransformers
from tests.support.serve_process import ServeProcess, replica_process_ids, serve_process
from tests.support.tiny_reward_model import save_tiny_reward_model, text

pytestmark = pytest.mark.slow

TOLERANCE = 1e-4
NUM_CLIENTS = 16
PAUSE_S = 0.2
"""The longest pause between a client's requests: the two cores also start replicas meanwhile."""
REPLACED_WITHIN_S = 120.0
MAX_BODY_BYTES = 1 << 20
MAX_COMPLETIONS = 1024
STEADY_AFTER_S = 60.0
"""Seconds after which the front's memory is taken to be steady."""
GROWTH_FRACTION = 0.1
"""The fraction by which the front's memory may grow from then to the end, except for the time of the hang."""
HANG_MIB = 120.0
"""MiB by which the front may grow while a replica hangs.

Serve's router asks the hung replica for its queue's length again and again, and the unanswered questions wait for its
end.
"""
SERVICE = """
[[models]]
model_name = "mixed"
checkpoint_dir = "{checkpoint_dir}"
num_replicas = 2
max_batch_tokens = 1024

[limits]
batch_timeout_s = 5
max_completions = {max_completions}
max_body_bytes = {max_body_bytes}
"""
MALFORMED = (
    b"{",
    b"",
    b"[]",
    b'{"inputs": []}',
    b'{"inputs": [{"prompt": "a", "completions": []}]}',
    b'{"inputs": [{"prompt": 3, "completions": ["b"]}]}',
)
SHARES = {
    "single": 0.6,
    "8 completions": 0.19,
    "256 inputs": 0.1,
    "malformed": 0.05,
    "oversized": 0.01,
    "cancelled": 0.05,
}
STATUSES = {"malformed": 422, "oversized": 413}
"""The status of each kind of request that gets no scores."""


@dataclass
class Tally:
    """What was sent, and what came back."""

    sent: Counter[str] = field(default_factory=Counter)
    statuses: Counter[tuple[str, int]] = field(default_factory=Counter)
    checkpoints: Counter[str] = field(default_factory=Counter)
    cancelled: int = 0
    latencies_s: dict[str, list[float]] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)
    events: list[str] = field(default_factory=list)
    rss_mib: list[tuple[float, float]] = field(default_factory=list)
    hang_s: list[float] = field(default_factory=list)
    """The times at which the replica stopped, and at which another had its place."""
    started_s: float = field(default_factory=time.monotonic)

    @property
    def age_s(self) -> float:
        return time.monotonic() - self.started_s

    def event(self, description: str) -> None:
        self.events.append(f"{self.age_s:6.1f} s  {description}")

    def summary(self) -> str:
        lines = [
            f"sent {sum(self.sent.values())}, answered {sum(self.statuses.values())}, cancelled {self.cancelled}, "
            f"in {self.age_s:.0f} s"
        ]
        lines += [f"  {kind}: {count} x {status}" for (kind, status), count in sorted(self.statuses.items())]
        lines += [f"  {count} replies of {checkpoint}" for checkpoint, count in self.checkpoints.items()]
        for kind, seconds in self.latencies_s.items():
            p50, p99, slowest = np.percentile(seconds, [50, 99, 100])
            lines.append(f"  {kind}: p50 {p50 * 1000:.0f} ms, p99 {p99 * 1000:.0f} ms, slowest {slowest:.1f} s")
        lines.append(f"  {sum(self.statuses.values()) / self.age_s:.1f} requests/s")
        every = max(1, len(self.rss_mib) // 15)
        lines.append(
            "  front's RSS, MiB: " + ", ".join(f"{mib:.0f} at {at:.0f} s" for at, mib in self.rss_mib[::every])
        )
        return "\n".join(["", *lines, *self.events, *self.wrong[:20]])


class Pool:
    """The inputs of the whole test, and the scores that plain transformers gives them with each checkpoint."""

    def __init__(self, checkpoint_dirs: list[Path]) -> None:
        rng = Random(0)

        def words(at_least: int) -> str:
            return text(rng, num_words=rng.randint(at_least, 40))

        self._singles = [ScoreInput(prompt=words(1), completions=[words(0)]) for _ in range(300)]
        self._eights = [ScoreInput(prompt=words(1), completions=[words(0) for _ in range(8)]) for _ in range(50)]
        self._scores: dict[str, dict[int, list[float]]] = {}
        for folder in checkpoint_dirs:
            plain = PlainTransformers(folder)
            self._scores[read_manifest(folder).content_sha256] = {
                id(item): plain.scores(item) for item in self._singles + self._eights
            }

    def inputs(self, rng: Random, kind: str) -> list[ScoreInput]:
        if kind == "8 completions":
            return [rng.choice(self._eights)]
        return rng.sample(self._singles, 256 if kind == "256 inputs" else 1)

    def what_is_wrong(self, reply: Reply, inputs: list[ScoreInput]) -> str | None:
        """Return what is wrong with the scores, None if they are those of the checkpoint that the reply names."""
        expected = [score for item in inputs for score in self._scores[reply.json["checkpoint"]][id(item)]]
        scores = [score for row in reply.scores for score in row]
        if [len(row) for row in reply.scores] != [len(item.completions) for item in inputs]:
            return "a reply of another shape"
        distance = float(np.max(np.abs(np.array(scores) - np.array(expected))))
        return (
            None
            if distance <= TOLERANCE
            else f"scores of {len(inputs)} inputs are {distance:.2g} away from plain transformers'"
        )


class Client:
    def __init__(self, url: str, pool: Pool, tally: Tally, seed: int) -> None:
        self._url, self._pool, self._tally, self._rng = url, pool, tally, Random(seed)

    async def ask_until(self, is_over: asyncio.Event) -> None:
        while not is_over.is_set():
            (kind,) = self._rng.choices(list(SHARES), list(SHARES.values()))
            self._tally.sent[kind] += 1
            try:
                await self._ask(kind)
            except (OSError, ValueError, TimeoutError) as error:  # a lost request; the test fails because of it
                self._tally.wrong.append(
                    f"{self._tally.age_s:.1f} s: {kind} got no reply: {type(error).__name__} {error}"
                )
            await asyncio.sleep(self._rng.uniform(0, PAUSE_S))

    async def _ask(self, kind: str) -> None:
        if kind == "malformed":
            self._count(kind, await post(self._url, self._rng.choice(MALFORMED)))
        elif kind == "oversized":
            many = [
                score_body(ScoreInput(prompt="red", completions=["blue"] * (MAX_COMPLETIONS + 1))),
                b" " * (MAX_BODY_BYTES + 1),
            ]
            self._count(kind, await post(self._url, self._rng.choice(many)))
        elif kind == "cancelled":
            await self._give_up(self._rng.choice(["single", "8 completions", "256 inputs"]))
        else:
            started_s = time.monotonic()
            inputs = self._pool.inputs(self._rng, kind)
            reply = await post(self._url, score_body(*inputs))
            self._tally.latencies_s.setdefault(kind, []).append(time.monotonic() - started_s)
            self._count(kind, reply, inputs)

    async def _give_up(self, of_kind: str) -> None:
        """Close the connection after a moment, unless the reply was faster."""
        inputs = self._pool.inputs(self._rng, of_kind)
        asking = asyncio.create_task(post(self._url, score_body(*inputs)))
        await asyncio.wait((asking,), timeout=self._rng.uniform(0, 0.05))
        if asking.done():
            self._count("cancelled", asking.result(), inputs)
            return
        asking.cancel()
        await asyncio.wait((asking,))
        self._tally.cancelled += 1

    def _count(self, kind: str, reply: Reply, inputs: list[ScoreInput] | None = None) -> None:
        tally = self._tally
        tally.statuses[kind, reply.status] += 1
        if reply.status != STATUSES.get(kind, 200):
            tally.wrong.append(f"{tally.age_s:.1f} s: {kind} got {reply.status}: {reply.body[:200]!r}")
        elif inputs is not None:
            tally.checkpoints[reply.json["checkpoint"]] += 1
            if (wrong := self._pool.what_is_wrong(reply, inputs)) is not None:
                tally.wrong.append(f"{tally.age_s:.1f} s: {kind}: {wrong}")


def rss_mib(process_id: int) -> float:
    (line,) = [
        line for line in Path(f"/proc/{process_id}/status").read_text().splitlines() if line.startswith("VmRSS:")
    ]
    return int(line.split()[1]) / 1024


def rss_around(tally: Tally, at_s: float) -> float:
    return min(tally.rss_mib, key=lambda sample: abs(sample[0] - at_s))[1]


class Events:
    """What happens to the service meanwhile.

    Every method blocks. `stopped` holds the ids of the processes that hang.
    """

    def __init__(self, process: ServeProcess, tally: Tally) -> None:
        self._process, self._tally = process, tally
        self.stopped: list[int] = []

    def replicas(self) -> set[int]:
        return replica_process_ids(self._process.running.session, "mixed") - set(self.stopped)

    def wait_for_two(self) -> set[int]:
        wait_until(lambda: len(self.replicas()) == 2, REPLACED_WITHIN_S, self._process.running.output)
        return self.replicas()

    def kill(self) -> None:
        victim = min(self.wait_for_two())
        os.kill(victim, signal.SIGKILL)
        self._tally.event("one replica killed")
        wait_until(lambda: victim not in self.replicas(), REPLACED_WITHIN_S, self._process.running.output)
        self.wait_for_two()
        self._tally.event("replaced")

    def hang(self) -> None:
        victim = min(self.wait_for_two())
        self.stopped.append(victim)
        os.kill(victim, signal.SIGSTOP)
        self._tally.event("one replica stopped")
        self._tally.hang_s.append(self._tally.age_s)
        self.wait_for_two()
        self._tally.event("replaced")
        self._tally.hang_s.append(self._tally.age_s)

    def swap(self, link: Path, checkpoint_dir: Path) -> None:
        following = link.with_name("next")
        following.symlink_to(checkpoint_dir)
        following.replace(link)
        self._process.running.process.send_signal(signal.SIGHUP)
        self._tally.event("SIGHUP for the other checkpoint")
        wait_until(lambda: self.names(checkpoint_dir), REPLACED_WITHIN_S, self._process.running.output)
        self._tally.event("it is served")

    def names(self, checkpoint_dir: Path) -> bool:
        reply = httpx.get(f"{self._process.url}/v1/models", timeout=20, trust_env=False)
        return (
            reply.status_code == 200
            and reply.json()["data"][0]["checkpoint"] == read_manifest(checkpoint_dir).content_sha256
        )


async def run_load(
    process: ServeProcess, pool: Pool, tally: Tally, *, seconds: float, events: list[Callable[[], None]]
) -> None:
    """Run the clients and the events, which come at equal distances.

    This returns when the events and the time are over and every request is answered.
    """
    is_over = asyncio.Event()

    async def watch_memory() -> None:
        while not is_over.is_set():
            tally.rss_mib.append((tally.age_s, rss_mib(process.running.process.pid)))
            await asyncio.sleep(min(5.0, seconds / 60))

    async def happen() -> None:
        try:
            for number, event in enumerate(events, start=1):
                await asyncio.sleep(number * seconds / (len(events) + 1) - tally.age_s)
                await asyncio.to_thread(event)
            await asyncio.sleep(seconds - tally.age_s)
        finally:
            is_over.set()

    clients = [Client(process.url, pool, tally, seed) for seed in range(NUM_CLIENTS)]
    async with asyncio.TaskGroup() as group:
        for task in (happen(), watch_memory(), *(client.ask_until(is_over) for client in clients)):
            group.create_task(task)


@pytest.mark.timeout(0)  # everything in it has a deadline; its length is an option
def test_under_a_mixed_load_a_kill_a_hang_and_a_swap_lose_nothing(
    request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    seconds = request.config.getoption("--load-seconds")
    first, second = (
        save_tiny_reward_model(tmp_path / name, seed=seed) for seed, name in enumerate(("first", "second"))
    )
    pool, link = Pool([first, second]), tmp_path / "served"
    link.symlink_to(first)
    service_file = tmp_path / "service.toml"
    service_file.write_text(
        SERVICE.format(checkpoint_dir=link, max_completions=MAX_COMPLETIONS, max_body_bytes=MAX_BODY_BYTES)
    )
    with serve_process(tmp_path, "--service", str(service_file), "--insecure-no-auth") as process:
        tally = Tally()
        events = Events(process, tally)
        try:
            asyncio.run(
                run_load(
                    process,
                    pool,
                    tally,
                    seconds=seconds,
                    events=[events.kill, events.hang, lambda: events.swap(link, second)],
                )
            )
        finally:
            print(tally.summary())
            still_stopped = [
                process_id
                for process_id in events.stopped
                if process_id in replica_process_ids(process.running.session, "mixed")
            ]
            for process_id in still_stopped:
                os.kill(process_id, signal.SIGKILL)
        print(f"stopped processes that Serve left: {len(still_stopped)} of {len(events.stopped)}")
        assert not tally.wrong
        assert sum(tally.sent.values()) == sum(tally.statuses.values()) + tally.cancelled
        assert set(tally.checkpoints) == {read_manifest(folder).content_sha256 for folder in (first, second)}
        assert set(tally.sent) == set(SHARES)
        assert metric(process.url, "rm_robust_queued_requests") == metric(process.url, "rm_robust_queued_tokens") == 0
        # The metric leaves out cancelled requests that the server had not read yet, or had just scored.
        assert 0 < metric(process.url, "rm_robust_cancelled_total") <= tally.cancelled
        lost = metric(process.url, "rm_robust_batches_lost_total")
        print(f"batches that went to another replica: {lost:.0f}")
        first_s, (stopped_s, replaced_s) = min(STEADY_AFTER_S, seconds / 4), tally.hang_s
        begin, before, after, end = (rss_around(tally, at_s) for at_s in (first_s, stopped_s, replaced_s, tally.age_s))
        print(
            f"front's RSS: {begin:.0f} MiB after the first minute, {before:.0f} to {after:.0f} MiB "
            f"while a replica hung, {end:.0f} MiB at the end"
        )
        assert before - begin + end - after <= GROWTH_FRACTION * begin
        assert after - before <= HANG_MIB
        process.running.process.send_signal(signal.SIGTERM)
        assert process.running.wait(REPLACED_WITHIN_S) == 0
