"""Let trainers take turns: each is a process of its own, and idle until the parent gives it a number of steps.

    parent ─num_steps─► trainer: that many steps ─Round─► parent ─num_steps─► the next trainer … ─None─► trainer: ends

The output of a trainer and its libraries goes to a log. The parent shows the end of the log if the trainer fails.
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
"""The setting by which OpenMP threads without work sleep. By default they spin, and take cores from other processes."""
END_TIMEOUT_S = 60.0
IDLE_CORES = 0.6
"""The most cores that all waiting processes together may use while they count as idle.

A process that still computes uses more. A dozen idle Ray actors and their cluster use 0.3 cores.
"""
IDLE_LOOK_S = 0.3
ACTORS = ("ray::PolicyTrainer", "ray::RolloutEngine")
"""The beginnings of the actors' process names."""
IDLE_TIMEOUT_S = 5.0
LOG_LINES = 25


@dataclass(frozen=True)
class Round:
    """A trainer's report on one turn."""

    seconds_per_step: float
    completion_tokens: float
    """The mean tokens of a completion, with its end-of-turn token."""
    phases: dict[str, list[float]] = field(default_factory=dict)
    """The seconds of each step, by phase."""


class RoundsAreOver(BaseException):
    """The parent wants no more steps. Like KeyboardInterrupt, it is no failure that a trainer may handle."""


class Turns:
    """A trainer's end of the pipe."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def next(self, done: Round | None) -> int:
        """Report the round that is done, wait for the next turn, and return the number of steps to do in it.

        `done` is None before the first round. Raises RoundsAreOver if there is no next turn.
        """
        self._connection.send(done)
        num_steps: int | None = self._connection.recv()
        if num_steps is None:
            raise RoundsAreOver
        return num_steps


class Run(Protocol):
    """The argument of a trainer."""

    @property
    def folder(self) -> Path:
        """The folder of this run, which holds its log."""
        ...


Trainer = Callable[[Turns, Any], None]
"""A function that trains the Run in its second argument. It calls `next` before every round, until that raises."""


class Contender:
    """The parent's end of a trainer. The process starts at once; call `wait_until_ready` before the first round."""

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
        """Start the process. `stack` ends it.

        `environment` is added to this process's own. `cluster_id` is the process whose descendants are its Ray cluster.
        """
        self.label = label
        self._cluster_id = cluster_id
        self.rounds: list[Round] = []
        self.cores: list[float] = []
        """The CPU cores that the trainer kept busy in each round."""
        self.others_cores: list[float] = []
        """The CPU cores that all waiting trainers together kept busy in each round."""
        run.folder.mkdir(parents=True, exist_ok=True)
        self._log = run.folder / "log.txt"
        context = mp.get_context("spawn")
        self._connection, theirs = context.Pipe()
        # The process is no daemon, because daemons may have no children.
        self._process = context.Process(target=_take_turns, args=(trainer, run, theirs, self._log))
        with patch.dict(os.environ, environment):  # OpenMP reads its settings when it is loaded
            self._process.start()
        theirs.close()
        stack.callback(self.close)

    def wait_until_ready(self) -> Self:
        self._receive()
        return self

    def run_round(self, num_steps: int, others: Sequence["Contender"] = ()) -> None:
        """Run one turn that counts.

        `others` are suspended meanwhile, except on this trainer's own Ray cluster. Before that, they may finish what
        they have started: a run of rm_robust goes on to sample the next step's completions.
        """
        _wait_until_idle({process_id for other in (self, *others) for process_id in other.process_ids})
        waiting_ids = {process_id for other in others for process_id in other.process_ids} - set(self.process_ids)
        with _suspended(
            {process_id for other in others for process_id in other.computing_ids()} - self.computing_ids()
        ):
            self._run_round(num_steps, waiting_ids)

    def _run_round(self, num_steps: int, waiting_ids: set[int]) -> None:
        started_s, cpu_s, waiting_s = time.perf_counter(), _cpu_seconds(self.process_ids), _cpu_seconds(waiting_ids)
        self._connection.send(num_steps)
        done = self._receive()
        seconds = time.perf_counter() - started_s
        assert isinstance(done, Round)
        self.rounds.append(done)
        self.cores.append((_cpu_seconds(self.process_ids) - cpu_s) / seconds)
        self.others_cores.append((_cpu_seconds(waiting_ids) - waiting_s) / seconds)

    def forget_rounds(self) -> None:
        self.rounds, self.cores, self.others_cores = [], [], []

    @property
    def process_id(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    @property
    def process_ids(self) -> tuple[int, ...]:
        """The processes that compute for this trainer together with their descendants."""
        return (self.process_id,) if self._cluster_id is None else (self.process_id, self._cluster_id)

    def computing_ids(self) -> set[int]:
        """Return this trainer's process and the actors of its Ray cluster. Ray's own processes must go on."""
        workers = [] if self._cluster_id is None else psutil.Process(self._cluster_id).children(recursive=True)
        return {self.process_id, *(worker.pid for worker in workers if worker.name().startswith(ACTORS))}

    def close(self) -> None:
        """End the process and everything that it started. A second call does nothing."""
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
        """The median seconds of a step over the rounds."""
        return median(done.seconds_per_step for done in self.rounds)

    @property
    def completion_tokens(self) -> float:
        return fmean(done.completion_tokens for done in self.rounds)

    def phase_s(self, phase: str) -> float:
        """Return the median seconds of a phase over all steps of all rounds, or 0 if this trainer lacks the phase."""
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
