"""What weight updates are measured by: one tensor of as many bytes, broadcast by gloo from one process to another over loopback."""

import os
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Self

import torch
import torch.distributed as dist

from tests.bench.rloo_turns import Contender, Round, Turns

PHASE = "broadcast"


@dataclass(frozen=True)
class BroadcastEnd:
    """One of the two processes; they meet in a file beside their folders."""

    folder: Path
    rank: int
    num_bytes: int


def broadcast(turns: Turns, end: BroadcastEnd) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{end.folder.parent / 'meeting'}", rank=end.rank, world_size=2)
    buffer = torch.full((end.num_bytes,), end.rank, dtype=torch.uint8)
    dist.broadcast(buffer, 0)
    done: Round | None = None
    while True:
        seconds = []
        for _ in range(turns.next(done)):
            dist.barrier()
            started_s = time.perf_counter()
            dist.broadcast(buffer, 0)
            seconds.append(time.perf_counter() - started_s)
        done = Round(fmean(seconds), 0, {PHASE: seconds})


class BareBroadcast:
    """Both processes."""

    def __init__(self, num_bytes: int, folder: Path, stack: ExitStack) -> None:
        ends = [BroadcastEnd(folder / str(rank), rank, num_bytes) for rank in range(2)]
        self._contenders = [Contender(f"bare broadcast, rank {end.rank}", broadcast, end, stack) for end in ends]
        self._seconds: list[float] = []

    def wait_until_ready(self) -> Self:
        for contender in self._contenders:
            contender.wait_until_ready()
        return self

    def run_round(self, num_broadcasts: int) -> None:
        for contender in self._contenders:
            contender.start(num_broadcasts)
        rounds = [contender.finish() for contender in self._contenders]
        self._seconds += [max(both) for both in zip(*(done.phases[PHASE] for done in rounds), strict=True)]

    @property
    def seconds(self) -> float:
        """Median of all broadcasts, each until both ends have done with it."""
        return median(self._seconds)
