"""What a person sees while a run works: a line for each stage, warnings, and nothing else.

    sft                     ██████▍             step 93 of 563, about 50 s left, loss 0.5924
    preferences             12 s

Where nobody watches (stderr is no terminal), a stage prints its line at most every PRINTED_EVERY_S seconds. Every log
line of every process of the run goes to a file, from this process's logging and from what Ray forwards. So nothing is
read back from the run's files, which may lie in an object store or on another node.
"""

import logging
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import NoReturn, Self, TextIO

from tqdm import tqdm

from rm_robust.cluster import worker_lines
from rm_robust.cluster.log_lines import LogLine, formatter, is_json, line_of, parse_text_line
from rm_robust.runs.files import shown
from rm_robust.runs.metrics import LoggedStep, parse_logged_step
from rm_robust.runs.status import SHOWN, duration

PRINTED_EVERY_S = 15.0
DRAWN_EVERY_S = 0.5
BAR = "{desc:22} {bar:20} {postfix}"
BAR_WITHOUT_STEPS = "{desc:22} {postfix}"
STAGE_LOGGER = "rm_robust.stage"
"""The logger that says that a stage begins, is done, or was done before."""
BEGINS = "begins"


def log_stage(name: str, event: str) -> None:
    """Log what happens to a whole stage: BEGINS, or how it ended."""
    logging.getLogger(STAGE_LOGGER).info("stage %s: %s", name, event)


def _prints(handler: logging.Handler) -> bool:
    return isinstance(handler, logging.StreamHandler) and not isinstance(handler, logging.FileHandler)


@contextmanager
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


@dataclass
class StageView:
    """The line of the stage that now works."""

    name: str
    label: str
    begun_at_s: float
    printed_at_s: float
    step: LoggedStep | None = None
    first_step: int = 0
    first_step_at_s: float = 0.0
    figures: dict[str, str] = field(default_factory=dict)
    """The latest value of each figure that a person wants to see."""

    def take(self, step: LoggedStep, now_s: float) -> None:
        if self.step is None:
            self.first_step, self.first_step_at_s = step.step, now_s
        self.step = step
        names = [name.partition("/")[2] for name in SHOWN.get(self.name, ())]
        self.figures |= {name: step.fields[name] for name in names if name in step.fields}

    def text(self, now_s: float) -> str:
        """Return the line without its label."""
        if self.step is None:
            return duration(now_s - self.begun_at_s)
        parts = [f"step {self.step.step} of {self.step.num_steps}"]
        num_timed = self.step.step - self.first_step
        if num_timed:
            pace_s = (now_s - self.first_step_at_s) / num_timed
            parts.append(f"about {duration(pace_s * (self.step.num_steps - self.step.step))} left")
        return ", ".join([*parts, *self.shown_figures()])

    def shown_figures(self) -> list[str]:
        return [f"{name} {value}" for name, value in self.figures.items()]


class Terminal:
    """The terminal of a run's command, as a context manager around the run. The main thread enters it.

    In the body, `log_to` names the file of all log lines; those that came before are kept for it. `is_verbose` prints
    every line instead, as does RM_ROBUST_LOG_FORMAT=json, for a collector of logs. Raises ConfigError for an unknown
    log format.
    """

    def __init__(self, *, is_verbose: bool, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._is_verbose = is_verbose or is_json()
        self._handler = _Records(self)
        self._earlier_handlers: list[logging.Handler] = []
        self._exits = ExitStack()
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
        self._earlier_handlers, root.handlers = root.handlers, [self._handler]
        root.setLevel(logging.INFO)
        self._exits.enter_context(rays_own_log_taken_over())
        worker_lines.take_over(self.take_worker_line)
        threading.Thread(target=self._tick, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._is_over.set()
        worker_lines.take_over(None)
        with self._lock:
            self._close_stage()
            if self._num_repeated:
                self.say(f"{self._num_repeated} repeated warnings are in {self.log_path}")
            logging.getLogger().handlers = self._earlier_handlers
            self._exits.close()
            if self._file is not None:
                self._file.close()
                self._file = None

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
                self.say(f"every log line goes to {shown(path)}")

    def say(self, text: str) -> None:
        """Print a line, above the bar of the stage that works."""
        with self._lock:
            if self._bar is not None:
                self._bar.clear()
            print(text, file=self._stream, flush=True)
            if self._bar is not None:
                self._bar.refresh()

    def take_worker_line(self, prefix: str, text: str) -> None:
        """Take a line that a worker printed."""
        self.take(prefix + text, parse_text_line(text))

    def take(self, text: str, line: LogLine | None) -> None:
        """Save a line, and show what it says of the stage; `line` is None for output that is no log line of ours."""
        with self._lock:
            self._save(text)
            if self._is_verbose:
                self.say(text)
            elif line is not None:
                self._show(line)

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
            self._stage.take(step, time.monotonic())

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
        elif self._stage is not None:
            result = ", ".join([event, *self._stage.shown_figures()])
            self._close_stage()
            self.say(f"{label:22} {result}")
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
        self._bar.bar_format = BAR_WITHOUT_STEPS if stage.step is None else BAR
        if stage.step is not None:
            self._bar.total, self._bar.n = stage.step.num_steps, stage.step.step
        self._bar.set_postfix_str(stage.text(now_s))


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
