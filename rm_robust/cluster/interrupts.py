"""Ctrl-C and SIGTERM: one line at once, an orderly end, and a hard one when that takes too long.

A hard end loses nothing: whatever a run commits is whole at every moment (rm_robust/runs/files.py), and the same
command continues from there.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import psutil

SIGNALS = (signal.SIGINT, signal.SIGTERM)
ENDS_WITHIN_S = 7.0
"""Seconds that a process which owns all its workers gets to end in order."""


class Interrupted(KeyboardInterrupt):
    """The user or the system told this process to end."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.exit_code = 128 + number


@contextlib.contextmanager
def interruptible(say: Callable[[str], None], message: str, *, ends_within_s: float = ENDS_WITHIN_S) -> Iterator[None]:
    """Raise Interrupted at the first Ctrl-C or SIGTERM in the body, after `say(message)`; a second signal ends hard.

    A hard end also comes when the body, and what this process does at its exit, together take longer than
    `ends_within_s` seconds. It kills the child processes, among them a local Ray. The main thread calls this. The
    earlier handlers return with the end of the body, unless it raises: then the process is about to end.
    """
    interrupts = _Interrupts(say, message, ends_within_s)
    earlier: dict[int, Any] = {number: signal.signal(number, interrupts.handle) for number in SIGNALS}
    try:
        yield
    except BaseException as error:
        if interrupts.number is not None:  # Ray makes a KeyboardInterrupt of its own, and cleaning up may fail as well
            raise Interrupted(interrupts.number) from error
        raise
    if interrupts.number is not None:  # a library has swallowed the exception
        raise Interrupted(interrupts.number)
    for number, handler in earlier.items():
        signal.signal(number, handler)


@contextlib.contextmanager
def signals_kept() -> Iterator[None]:
    """Keep this process's own handlers of Ctrl-C and SIGTERM from what a library does in the body.

    A handler that a library sets where the process had none of its own stays.
    """
    handlers: dict[int, Any] = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in handlers.items():
                if handler not in (signal.SIG_DFL, None):
                    signal.signal(number, handler)


class _Interrupts:
    def __init__(self, say: Callable[[str], None], message: str, ends_within_s: float) -> None:
        self._say, self._message, self._ends_within_s = say, message, ends_within_s
        self.number: int | None = None
        """The signal that came; None before one came."""

    def handle(self, number: int, frame: FrameType | None) -> None:
        del frame
        if self.number is not None:
            end_hard(128 + number)
        self.number = number
        timer = threading.Timer(self._ends_within_s, end_hard, [128 + number])
        timer.daemon = True
        timer.start()
        with contextlib.suppress(OSError, RuntimeError):  # nobody reads stderr, or a print to it was interrupted
            self._say(self._message)
        raise Interrupted(number)


def end_hard(exit_code: int) -> None:
    """Kill all processes below this one, and end this one without any cleaning up."""
    for process in psutil.Process().children(recursive=True):
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue  # it has ended by itself
    os._exit(exit_code)
