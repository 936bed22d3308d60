"""Trainers that take turns: each in a process of its own, idle until the parent gives it a number of steps.

    parent ─num_steps─► trainer: that many steps ─Round─► parent ─num_steps─► the next trainer … ─None─► trainer: ends

What a trainer and its libraries write goes to a log; the parent shows its end when the trainer fails.
"""

import math
import multiprocessing as mp
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import fmean, median
from typing import Any, Protocol, Self
from unittest.mock import patch

import psutil

from research.bench.load_client import cpu_seconds

PASSIVE = {"OMP_WAIT_POLICY": "PASSIVE"}
"""Threads without work sleep; spinning, their default, they take the cores from whoever else computes."""
END_TIMEOUT_S = 60.0
IDLE_CORES = 0.6
"""Of all that wait, together. Who still computes takes more; a dozen idle Ray actors and their cluster take 0.3."""
IDLE_LOOK_S = 0.3
ACTORS = ("ray::PolicyTrainer", "ray::RolloutEngine")
"""Names of their processes."""
IDLE_TIMEOUT_S = 5.0
LOG_LINES = 25


@dataclass(frozen=True)
class Round:
    """What a trainer reports of one turn."""

    seconds_per_step: float
    completion_tokens: float
    """Mean tokens of a completion, its end-of-turn token included."""
    phases: dict[str, list[float]] = field(default_factory=dict)
    """Seconds of each step in each phase."""


class RoundsAreOver(BaseException):
    """The parent wants no more steps. As a KeyboardInterrupt, it is nothing that a trainer may handle as a failure."""


class Turns:
    """A trainer's end of the pipe."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def next(self, done: Round | None) -> int:
        """Report the round that is done (None: ready for the first), wait for the turn, and return the steps to do in it. Raises RoundsAreOver."""
        self._connection.send(done)
        num_steps: int | None = self._connection.recv()
        if num_steps is None:
            raise RoundsAreOver
        return num_steps


class Run(Protocol):
    """What a trainer is given."""

    @property
    def folder(self) -> Path:
        """Its own; holds its log."""
        ...


Trainer = Callable[[Turns, Any], None]
"""Trains the Run that is its second argument, calling `next` before every round, until that raises."""


class Contender:
    """The parent's end: the process starts at once; `wait_until_ready` before the first round."""

    def __init__(
        self,
        label: str,
        trainer: Trainer,
        run: Run,
        stack: ExitStack,
        *,
        environment: Mapping[str, str] = PASSIVE,
        cluster_id: int | None = None,
    ) -> None:
        """`stack` ends it. `environment` is set beside this process's own; `cluster_id`: the process whose descendants are its Ray cluster."""
        self.label = label
        self._cluster_id = cluster_id
        self.rounds: list[Round] = []
        self.cores: list[float] = []
        """CPU cores that it kept busy in each round."""
        self.others_cores: list[float] = []
        """And those that waited meanwhile, together."""
        run.folder.mkdir(parents=True, exist_ok=True)
        self._log = run.folder / "log.txt"
        context = mp.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(
            target=_take_turns, args=(trainer, run, theirs, self._log)
        )  # no daemon: those may have no children
        with patch.dict(os.environ, environment):  # OpenMP reads its settings when it is loaded
            self._process.start()
        theirs.close()
        stack.callback(self.close)

    def wait_until_ready(self) -> Self:
        self._receive()
        return self

    def run_round(self, num_steps: int, others: Sequence["Contender"] = ()) -> None:
        """A turn that counts. `others` are suspended meanwhile, except on its own Ray cluster, once they have done what they had begun (a run of ours goes on
        to sample the next step's completions)."""
        _wait_until_idle({process_id for other in (self, *others) for process_id in other.process_ids})
        waiting_ids = {process_id for other in others for process_id in other.process_ids} - set(self.process_ids)
        with _suspended(
            {process_id for other in others for process_id in other.computing_ids()} - self.computing_ids()
        ):
            self._run_round(num_steps, waiting_ids)

    def _run_round(self, num_steps: int, waiting_ids: set[int]) -> None:
        started_s, own_s, waiting_s = time.perf_counter(), _cpu_seconds(self.process_ids), _cpu_seconds(waiting_ids)
        self._connection.send(num_steps)
        done = self._receive()
        seconds = time.perf_counter() - started_s
        assert isinstance(done, Round)
        self.rounds.append(done)
        self.cores.append((_cpu_seconds(self.process_ids) - own_s) / seconds)
        self.others_cores.append((_cpu_seconds(waiting_ids) - waiting_s) / seconds)

    def forget_rounds(self) -> None:
        self.rounds, self.cores, self.others_cores = [], [], []

    @property
    def process_id(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    @property
    def process_ids(self) -> tuple[int, ...]:
        """Those whose descendants, and they themselves, compute for it."""
        return (self.process_id,) if self._cluster_id is None else (self.process_id, self._cluster_id)

    def computing_ids(self) -> set[int]:
        """Its process, and the actors of its Ray cluster; Ray's own processes must go on."""
        workers = [] if self._cluster_id is None else psutil.Process(self._cluster_id).children(recursive=True)
        return {self.process_id, *(worker.pid for worker in workers if worker.name().startswith(ACTORS))}

    def close(self) -> None:
        """End the process and all that it started; nothing happens the second time."""
        if self._process.is_alive():
            with suppress(OSError):  # it has just ended
                self._connection.send(None)
            self._process.join(END_TIMEOUT_S)
        if self._process.is_alive():
            self._process.terminate()
            self._process.join()

    @property
    def steps_per_s(self) -> list[float]:
        return [1 / done.seconds_per_step for done in self.rounds]

    @property
    def step_s(self) -> float:
        """Median over the rounds."""
        return median(done.seconds_per_step for done in self.rounds)

    @property
    def completion_tokens(self) -> float:
        return fmean(done.completion_tokens for done in self.rounds)

    def phase_s(self, phase: str) -> float:
        """Median over all steps of all rounds; 0 for a phase that this trainer does not have."""
        values = [value for done in self.rounds for value in done.phases.get(phase, [])]
        return median(values) if values else 0.0

    def _receive(self) -> Round | None:
        try:
            done: Round | None = self._connection.recv()
        except EOFError:
            self._process.join()
            last_lines = "\n".join(self._log.read_text(errors="replace").splitlines()[-LOG_LINES:])
            sys.exit(f"bench-rloo: {self.label} failed. The end of its log:\n{last_lines}")
        return done


@contextmanager
def _suspended(process_ids: Iterable[int]) -> Iterator[None]:
    def send(number: int) -> None:
        for process_id in process_ids:
            with suppress(ProcessLookupError):
                os.kill(process_id, number)

    try:
        send(signal.SIGSTOP)
        yield
    finally:
        send(signal.SIGCONT)


def _wait_until_idle(process_ids: Iterable[int]) -> None:
    deadline_s = time.monotonic() + IDLE_TIMEOUT_S
    cores = math.inf
    while cores > IDLE_CORES and time.monotonic() < deadline_s:
        before_s = _cpu_seconds(process_ids)
        time.sleep(IDLE_LOOK_S)
        cores = (_cpu_seconds(process_ids) - before_s) / IDLE_LOOK_S


def _cpu_seconds(process_ids: Iterable[int]) -> float:
    return sum(map(cpu_seconds, process_ids))


def _take_turns(trainer: Trainer, run: Run, connection: Connection, log: Path) -> None:
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    try:
        trainer(Turns(connection), run)
    except (RoundsAreOver, KeyboardInterrupt):
        return
