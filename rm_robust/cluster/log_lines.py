"""What a log line says, in every process of a run: when, how grave, of which run, stage and worker, who, what.

    2026-01-01 00:00:00,123 INFO [tiny_cpu reward_model rank 0] rm_robust.training.loop: reward_model step 1/200 loss=0.69 …

With RM_ROBUST_LOG_FORMAT=json, which ray_session.py hands on to a run's workers, one JSON object a line:

    {"time": "2026-01-01T00:00:00.123+00:00", "level": "INFO", "run": "tiny_cpu", "stage": "reward_model", "worker": "rank 0", "logger": …, "message": …}

Not Ray's own LoggingConfig: that knows no run and no stage, and nothing that is said before ray.init.
"""

import json
import logging
import os
import sys
from datetime import UTC, datetime

from rm_robust.errors import ConfigError

FORMAT_VARIABLE = "RM_ROBUST_LOG_FORMAT"
ABOUT_VARIABLE = "RM_ROBUST_LOG_ABOUT"
"""Whose lines a process writes, for one that is told by its environment: an actor of RLOO."""

_about: dict[str, str] = json.loads(os.environ.get(ABOUT_VARIABLE, "{}"))


class TextLines(logging.Formatter):
    """For people."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(about)s%(name)s: %(message)s")

    def format(self, record: logging.LogRecord) -> str:
        record.about = f"[{' '.join(_about.values())}] " if _about else ""
        return super().format(record)


class JsonLines(logging.Formatter):
    """For programs."""

    def format(self, record: logging.LogRecord) -> str:
        at = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        line = {"time": at, "level": record.levelname, **_about, "logger": record.name, "message": record.getMessage()}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


def start_logging(level: int = logging.INFO, *, force: bool = False) -> None:
    """This process's lines go to its stderr; `force` where a library has begun to log in its own way. Raises ConfigError for a format that there is not."""
    formats = {"text": TextLines, "json": JsonLines}
    wanted = os.environ.get(FORMAT_VARIABLE, "text")
    if wanted not in formats:
        raise ConfigError(
            f"{FORMAT_VARIABLE} = {wanted!r} is no format of log lines; set it to {' or '.join(formats)}, or unset it for text."
        )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(formats[wanted]())
    logging.basicConfig(level=level, handlers=[handler], force=force)


def lines_are_of(run: str, stage: str, worker: str | None = None) -> None:
    """What every line of this process says from now on."""
    _about.clear()
    _about.update(_named(run, stage, worker))


def environment_of(run: str, stage: str, worker: str) -> dict[str, str]:
    """The same for a process that is yet to start."""
    return {ABOUT_VARIABLE: json.dumps(_named(run, stage, worker))}


def _named(run: str, stage: str, worker: str | None) -> dict[str, str]:
    return {"run": run, "stage": stage} | ({} if worker is None else {"worker": worker})
