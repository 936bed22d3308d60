"""The log lines of every process of a run: time, level, run, stage, worker, logger and message.

    2026-01-01 00:00:00,123 INFO [demo reward_model rank 0] rm_robust.training.loop: reward_model step 1/200 loss=0.69 …

RM_ROBUST_LOG_FORMAT=json makes each line a JSON object. A run's workers inherit it (rm_robust/cluster/environment.py):

    {"time": "2026-01-01T00:00:00.123+00:00", "level": "INFO", "run": "demo", "stage": "reward_model",
     "worker": "rank 0", "logger": …, "message": …}

Ray's own LoggingConfig is not used: it knows no run and no stage, and nothing that is logged before ray.init.
"""

import json
import logging
import os
import re
import sys
from dataclasses import dataclass, field
from datetime import UTC, datetime

from rm_robust.errors import ConfigError

FORMAT_VARIABLE = "RM_ROBUST_LOG_FORMAT"
ABOUT_VARIABLE = "RM_ROBUST_LOG_ABOUT"
"""The environment variable that tells a process its run, stage and worker, as for an actor of RLOO."""

_TEXT_LINE = re.compile(
    r"(?P<time>\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}) (?P<level>[A-Z]+) "
    r"(\[(?P<about>[^]]*)\] )?(?P<logger>[\w.]+): (?P<message>.*)"
)

_about: dict[str, str] | None = None
"""Run, stage and worker of this process; None until a line needs them, because a fork changes the environment."""


class TextLines(logging.Formatter):
    """Format log lines for people."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(about)s%(name)s: %(message)s")

    def format(self, record: logging.LogRecord) -> str:
        about = _about_this_process()
        record.about = f"[{' '.join(about.values())}] " if about else ""
        return super().format(record)


@dataclass(frozen=True)
class LogLine:
    """What a reader of a log line needs of it."""

    level: int
    """The level as in the module logging, for example logging.WARNING."""
    run: str | None
    stage: str | None
    logger: str
    message: str
    time_s: float = field(compare=False)
    """When it was logged, in Unix seconds; a line of text has milliseconds."""


def line_of(record: logging.LogRecord) -> LogLine:
    """Return the line of a record of this process."""
    about = _about_this_process()
    return LogLine(
        record.levelno, about.get("run"), about.get("stage"), record.name, record.getMessage(), record.created
    )


def parse_text_line(text: str) -> LogLine | None:
    """Parse a line of TextLines, from any process; None for what is no such line, or a later line of its message."""
    match = _TEXT_LINE.fullmatch(text)
    if match is None or match["level"] not in logging.getLevelNamesMapping():
        return None
    about = (match["about"] or "").split(" ")
    run, stage = (about[0], about[1]) if len(about) > 1 else (None, None)
    level, time_s = logging.getLevelNamesMapping()[match["level"]], datetime.fromisoformat(match["time"]).timestamp()
    return LogLine(level, run, stage, match["logger"], match["message"], time_s)


class JsonLines(logging.Formatter):
    """Format log lines for programs, as JSON objects."""

    def format(self, record: logging.LogRecord) -> str:
        at = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        line = {"time": at, "level": record.levelname, **_about_this_process()}
        line |= {"logger": record.name, "message": record.getMessage()}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


def is_json() -> bool:
    """Return whether log lines are JSON objects, for programs. Raises ConfigError for an unknown format."""
    return _formatter_class() is JsonLines


def _formatter_class() -> type[TextLines] | type[JsonLines]:
    formats: dict[str, type[TextLines] | type[JsonLines]] = {"text": TextLines, "json": JsonLines}
    wanted = os.environ.get(FORMAT_VARIABLE, "text")
    if wanted not in formats:
        raise ConfigError(
            f"{FORMAT_VARIABLE} = {wanted!r} is not a format of log lines; "
            f"set it to {' or '.join(formats)}, or unset it for text."
        )
    return formats[wanted]


def formatter() -> logging.Formatter:
    """Return the formatter of this process's log lines. Raises ConfigError for an unknown format."""
    return _formatter_class()()


def start_logging(level: int = logging.INFO, *, force: bool = False) -> None:
    """Write the log lines of this process to its stderr. Raises ConfigError for an unknown format.

    `force` replaces the handlers of a library that has already set up logging in its own way.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(formatter())
    logging.basicConfig(level=level, handlers=[handler], force=force)


def lines_are_of(run: str, stage: str, worker: str | None = None) -> None:
    """Set the run, stage and worker that every log line of this process names from now on."""
    global _about
    _about = _named(run, stage, worker)


def environment_of(run: str, stage: str, worker: str) -> dict[str, str]:
    """Return the environment variable that sets run, stage and worker for the log lines of a process yet to start."""
    return {ABOUT_VARIABLE: json.dumps(_named(run, stage, worker))}


def _about_this_process() -> dict[str, str]:
    global _about
    if _about is None:
        _about = json.loads(os.environ.get(ABOUT_VARIABLE, "{}"))
    return _about


def _named(run: str, stage: str, worker: str | None) -> dict[str, str]:
    return {"run": run, "stage": stage} | ({} if worker is None else {"worker": worker})
