"""Ctrl-C and SIGTERM: an orderly end at the first, a hard one at the second or when the end takes too long."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import psutil
import pytest

from rm_robust.cluster.interrupts import SIGNALS, Interrupted, interruptible, signals_kept

SCRIPT = """
import signal, subprocess, sys, time
from rm_robust.cluster.interrupts import Interrupted, interruptible
say = lambda text: print(text, flush=True)
try:
    with interruptible(say, "stopping", ends_within_s={ends_within_s}):
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        print("child", child.pid, flush=True)
        try:
            time.sleep(60)
        finally:
            {cleaning_up}
except Interrupted as interrupted:
    child.kill()
    sys.exit(interrupted.exit_code)
"""


def started(cleaning_up: str, ends_within_s: float) -> tuple[subprocess.Popen[str], psutil.Process]:
    """Start the script, and return it and its child once both run."""
    script = SCRIPT.format(cleaning_up=cleaning_up, ends_within_s=ends_within_s)
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, psutil.Process(int(process.stdout.readline().split()[1]))


def is_gone(process: psutil.Process) -> bool:
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_is_answered_at_once_and_cleaning_up_is_done(number: signal.Signals) -> None:
    process, _ = started("say('cleaned up')", 30)
    process.send_signal(number)
    assert process.communicate(timeout=20)[0].splitlines() == ["stopping", "cleaned up"]
    assert process.returncode == 128 + number


@pytest.mark.parametrize("cleaning_up", ["raise OSError('away')", "return_ = 1"])
def test_an_error_while_cleaning_up_does_not_change_the_exit_code(cleaning_up: str) -> None:
    process, _ = started(cleaning_up, 30)
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 130


def test_a_second_signal_kills_the_children_and_ends_at_once() -> None:
    process, child = started("time.sleep(60)", 30)
    process.send_signal(signal.SIGINT)
    assert process.stdout is not None
    assert process.stdout.readline() == "stopping\n"
    process.send_signal(signal.SIGINT)
    assert process.wait(10) == 130
    psutil.wait_procs([child], timeout=5)
    assert is_gone(child)


def test_an_end_that_takes_too_long_becomes_a_hard_one() -> None:
    process, child = started("time.sleep(60)", 0.5)
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == 143
    psutil.wait_procs([child], timeout=5)
    assert is_gone(child)


@pytest.fixture
def _handlers_return() -> Iterator[None]:
    """Put the handlers back, and stop the timer, of a process that does not end."""
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)
    for thread in threading.enumerate():
        if isinstance(thread, threading.Timer):
            thread.cancel()


@pytest.mark.usefixtures("_handlers_return")
def test_a_body_that_swallows_the_exception_still_ends_as_interrupted() -> None:
    def body() -> None:
        with interruptible(lambda text: None, "stopping"), contextlib.suppress(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)

    with pytest.raises(Interrupted) as raised:
        body()
    assert raised.value.exit_code == 143


def test_handlers_are_put_back_and_kept_from_libraries() -> None:
    before = signal.getsignal(signal.SIGINT)
    with interruptible(lambda text: None, "stopping"):
        own = signal.getsignal(signal.SIGINT)
        with signals_kept():
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        assert signal.getsignal(signal.SIGINT) is own
    assert signal.getsignal(signal.SIGINT) is before
