"""What a person sees while a run works: a line for each stage, warnings, and nothing else.

    sft                     ██████▍             step 93 of 563, about 50 s left, loss 0.5924
    preferences             done in 12 s

Where nobody watches (stderr is no terminal), a stage prints its line at most every PRINTED_EVERY_S seconds. Every log
line of every process of the run goes to a file, from this process's logging and from what Ray forwards. So nothing is
read back from the run's files, which may lie in an object store or on another node.
"""

import contextlib
import logging
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import NoReturn, Self, TextIO

import ray
from tqdm import tqdm

from rm_robust.cluster import worker_lines
from rm_robust.cluster.log_lines import LogLine, formatter, is_json, line_of, parse_text_line
from rm_robust.cluster.stage_view import StageView
from rm_robust.errors import StorageError
from rm_robust.runs.files import persist, shown
from rm_robust.runs.metrics import STAGE_LOGGER, parse_logged_step

PRINTED_EVERY_S = 15.0
DRAWN_EVERY_S = 0.5
FORWARDED_WITHIN_S = 0.6
"""Seconds after which Ray has forwarded what a worker printed (Ray itself waits 0.5 s at its end)."""
BEGINS = "begins"
DONE = "done"


def _restore(log: logging.Logger, handlers: list[logging.Handler], level: int) -> None:
    log.handlers = handlers
    log.setLevel(level)


def _prints(handler: logging.Handler) -> bool:
    return isinstance(handler, logging.StreamHandler) and not isinstance(handler, logging.FileHandler)


@contextlib.contextmanager
def rays_own_log_taken_over() -> Iterator[None]:
    """Let what Ray's libraries log in this process go where all log lines go; Ray 2.60 prints it on stderr."""
    import ray.data  # each library sets up its printing when it is imported
    import ray.serve

    logs = [logging.getLogger(module.__name__) for module in (ray, ray.data, ray.serve)]
    earlier = [(log, log.handlers, log.propagate) for log in logs]
    for log in logs:
        log.handlers = [handler for handler in log.handlers if not _prints(handler)]
        log.propagate = True
    try:
        yield
    finally:
        for log, handlers, propagates in earlier:
            log.handlers, log.propagate = handlers, propagates


class Terminal:
    """The terminal of a run's command, as a context manager around the run. The main thread enters it.

    In the body, `log_to` names the file of all log lines; those that came before are kept for it. `is_verbose` prints
    every line instead, as does RM_ROBUST_LOG_FORMAT=json, for a collector of logs. Raises ConfigError for an unknown
    log format.
    """

    def __init__(self, *, is_verbose: bool, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr or open(os.devnull, "w")  # stderr is None where it was closed  # noqa: SIM115
        self._is_json = is_json()
        self._is_verbose = is_verbose or self._is_json
        self._handler = _Records(self)
        self._exits = contextlib.ExitStack()
        self._lock = threading.RLock()
        self._unsaved: list[str] | None = []
        self._file: TextIO | None = None
        self.log_path: Path | None = None
        self._stage: StageView | None = None
        self._bar: tqdm[NoReturn] | None = None
        self._warned: set[str] = set()
        self._num_repeated = 0
        self._is_over = threading.Event()

    def __enter__(self) -> Self:
        root = logging.getLogger()
        self._exits.callback(_restore, root, root.handlers, root.level)
        root.handlers = [self._handler]
        root.setLevel(logging.INFO)
        logging.captureWarnings(True)
        self._exits.callback(logging.captureWarnings, False)
        self._exits.enter_context(rays_own_log_taken_over())
        worker_lines.take_over(self.take_worker_line)
        threading.Thread(target=self._tick, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if ray.is_initialized():
            time.sleep(FORWARDED_WITHIN_S)
        self._is_over.set()
        worker_lines.take_over(None)
        with self._lock:
            self._close_stage()
            if self._num_repeated:
                self.say(f"{self._num_repeated} repeated warnings are in {self.log_path}")
            self._exits.close()
            if self._file is not None and self.log_path is not None:
                self._file.close()
                self._file = None
                try:
                    persist(self.log_path)
                except StorageError as error:  # which must not hide how the run ended
                    self.say(f"warning: {error}")

    def log_to(self, path: Path) -> None:
        """Append all log lines to the file, also those before this call. A file that cannot be written is said once."""
        with self._lock:
            lines, self._unsaved = self._unsaved or [], None
            self.log_path = path
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                self._file = path.open("a", encoding="utf-8", errors="replace", buffering=1)
            except OSError as error:
                self._give_up_file(error)
            for line in lines:
                self._save(line)
            if not self._is_verbose:
                stored = "" if shown(path) == str(path) else f", and in the end to {shown(path)}"
                self.say(f"every log line goes to {path}{stored}")

    def say(self, text: str) -> None:
        """Print a line, above the bar of the stage that works."""
        with self._lock:
            if self._bar is not None:
                self._bar.clear()
            with contextlib.suppress(OSError):  # a pipe whose reader has gone
                print(text, file=self._stream, flush=True)
            if self._bar is not None:
                self._bar.refresh()

    def take_worker_line(self, prefix: str, text: str) -> None:
        """Take a line that a worker, the raylet or the autoscaler printed."""
        if self._is_json and text.startswith("{"):
            prefix = ""  # the object names its process
        with self._lock:
            self.take(prefix + text, parse_text_line(text))
            news = None if self._is_verbose else worker_lines.rays_news(prefix, text)
            if news is not None:
                self._warn(news)

    def take(self, text: str, line: LogLine | None) -> None:
        """Save a line, and show what it says of the stage; `line` is None for output that is no log line of ours."""
        with self._lock:
            self._save(text)
            if self._is_verbose:
                self.say(text)
            elif line is not None:
                self._show(line)

    def save(self, text: str) -> None:
        """Write text into the log alone."""
        with self._lock:
            self._save(text)

    def _save(self, text: str) -> None:
        if self._unsaved is not None:
            self._unsaved.append(text)
        if self._file is not None:
            try:
                self._file.write(text + "\n")
            except OSError as error:
                self._give_up_file(error)

    def _give_up_file(self, error: OSError) -> None:
        self._file = None
        self.say(f"warning: {self.log_path} cannot be written ({error}); from here on, log lines are lost")

    def _show(self, line: LogLine) -> None:
        step = parse_logged_step(line.message)
        if line.level >= logging.WARNING:
            self._warn(f"{logging.getLevelName(line.level).lower()}: {line.message}")
        elif line.logger == STAGE_LOGGER:
            self._show_stage(line)
        elif step is not None and self._stage is not None and line.stage == self._stage.name:
            self._stage.take(step, line.time_s)

    def _warn(self, text: str) -> None:
        if text in self._warned:
            self._num_repeated += 1
        else:
            self._warned.add(text)
            self.say(text)

    def _show_stage(self, line: LogLine) -> None:
        name, _, event = line.message.removeprefix("stage ").partition(": ")
        part = (line.run or "").partition("/")[2]  # of the run, for example its Bradley-Terry twin
        label = f"{part}/{name}" if part else name
        if event == BEGINS:
            self._close_stage()
            self._stage = StageView(name, label, time.monotonic(), time.monotonic())
            self.draw()
        elif event.startswith(DONE):
            figures = [] if self._stage is None else self._stage.shown_figures()
            self._close_stage()
            self.say(f"{label:22} {', '.join([event, *figures])}")
        else:
            self.say(line.message)

    def _close_stage(self) -> None:
        if self._bar is not None:
            self._bar.close()
        self._stage = self._bar = None

    def _tick(self) -> None:
        while not self._is_over.wait(DRAWN_EVERY_S):
            self.draw()

    def draw(self) -> None:
        """Draw the bar of the stage that works anew; where nobody watches, print its line when it is time."""
        with self._lock:
            if self._stage is not None and not self._is_verbose:
                self._draw(self._stage, time.monotonic())

    def _draw(self, stage: StageView, now_s: float) -> None:
        if not self._stream.isatty():
            if now_s - stage.printed_at_s >= PRINTED_EVERY_S:
                stage.printed_at_s = now_s
                self.say(f"{stage.label:22} {stage.text(now_s)}")
            return
        if self._bar is None:
            self._bar = tqdm(total=1, desc=stage.label, file=self._stream, leave=False, dynamic_ncols=True)
        text = stage.text(now_s).replace("{", "{{").replace("}", "}}")
        self._bar.bar_format = f"{{desc:22}} {text}" if stage.step is None else f"{{desc:22}} {{bar:20}} {text}"
        if stage.step is not None:
            self._bar.total, self._bar.n = stage.step.num_steps, stage.step.step
        self._bar.refresh()


class _Records(logging.Handler):
    """Hands the log records of this process to the terminal."""

    def __init__(self, terminal: Terminal) -> None:
        super().__init__()
        self._terminal = terminal
        self.setFormatter(formatter())

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._terminal.take(self.format(record), line_of(record))
        except Exception:
            self.handleError(record)
