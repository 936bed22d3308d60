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
import sys
from datetime import UTC, datetime

from rm_robust.errors import ConfigError

FORMAT_VARIABLE = "RM_ROBUST_LOG_FORMAT"
ABOUT_VARIABLE = "RM_ROBUST_LOG_ABOUT"
"""The environment variable that tells a process its run, stage and worker, as for an actor of RLOO."""

_about: dict[str, str] = json.loads(os.environ.get(ABOUT_VARIABLE, "{}"))


class TextLines(logging.Formatter):
    """Format log lines for people."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(about)s%(name)s: %(message)s")

    def format(self, record: logging.LogRecord) -> str:
        record.about = f"[{' '.join(_about.values())}] " if _about else ""
        return super().format(record)


class JsonLines(logging.Formatter):
    """Format log lines for programs, as JSON objects."""

    def format(self, record: logging.LogRecord) -> str:
        at = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        line = {"time": at, "level": record.levelname, **_about, "logger": record.name, "message": record.getMessage()}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


def start_logging(level: int = logging.INFO, *, force: bool = False) -> None:
    """Write the log lines of this process to its stderr. Raises ConfigError for an unknown format.

    `force` replaces the handlers of a library that has already set up logging in its own way.
    """
    formats = {"text": TextLines, "json": JsonLines}
    wanted = os.environ.get(FORMAT_VARIABLE, "text")
    if wanted not in formats:
        raise ConfigError(
            f"{FORMAT_VARIABLE} = {wanted!r} is not a format of log lines; "
            f"set it to {' or '.join(formats)}, or unset it for text."
        )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(formats[wanted]())
    logging.basicConfig(level=level, handlers=[handler], force=force)


def lines_are_of(run: str, stage: str, worker: str | None = None) -> None:
    """Set the run, stage and worker that every log line of this process names from now on."""
    _about.clear()
    _about.update(_named(run, stage, worker))


def environment_of(run: str, stage: str, worker: str) -> dict[str, str]:
    """Return the environment variable that sets run, stage and worker for the log lines of a process yet to start."""
    return {ABOUT_VARIABLE: json.dumps(_named(run, stage, worker))}


def _named(run: str, stage: str, worker: str | None) -> dict[str, str]:
    return {"run": run, "stage": stage} | ({} if worker is None else {"worker": worker})
