"""Every log line names its run, stage and worker, as text for people or as one JSON object."""

import json
import logging
import os
import subprocess
import sys
from datetime import UTC, datetime

import pytest

from rm_robust.cluster import log_lines
from rm_robust.cluster.log_lines import (
    FORMAT_VARIABLE,
    JsonLines,
    TextLines,
    environment_of,
    lines_are_of,
    start_logging,
)
from rm_robust.errors import ConfigError

SCRIPT = """
import logging
from rm_robust.cluster.log_lines import lines_are_of, start_logging
start_logging()
logger = logging.getLogger("rm_robust.some_module")
logger.info("before\\nthe run")
lines_are_of("mine", "reward_model", "rank 1")
logger.warning("%d pairs of %s", 7, "né")
try:
    raise OSError("away")
except OSError:
    logger.exception("lost")
lines_are_of("mine", "report")
logger.debug("not said")
logger.info("the end")
"""


def stderr_of(script: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", script], env=os.environ | environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


def test_as_json_every_line_is_one_object_with_run_stage_and_worker() -> None:
    lines = [json.loads(line) for line in stderr_of(SCRIPT, RM_ROBUST_LOG_FORMAT="json").splitlines()]
    ages_s = [(datetime.now(UTC) - datetime.fromisoformat(line.pop("time"))).total_seconds() for line in lines]
    assert all(-1 < age_s < 60 for age_s in ages_s)
    assert lines[2].pop("exception").splitlines()[-1] == "OSError: away"
    about = {"run": "mine", "stage": "reward_model", "worker": "rank 1", "logger": "rm_robust.some_module"}
    assert lines == [
        {"level": "INFO", "logger": "rm_robust.some_module", "message": "before\nthe run"},
        {"level": "WARNING", **about, "message": "7 pairs of né"},
        {"level": "ERROR", **about, "message": "lost"},
        {"level": "INFO", "run": "mine", "stage": "report", "logger": "rm_robust.some_module", "message": "the end"},
    ]


def test_text_lines_have_them_in_brackets_and_a_child_process_can_get_them_from_its_environment() -> None:
    script = (
        "import logging; from rm_robust.cluster.log_lines import start_logging; start_logging(); "
        "logging.getLogger('x').info('up')"
    )
    assert stderr_of(script, **environment_of("mine", "rloo", "trainer 0")).endswith(
        " INFO [mine rloo trainer 0] x: up\n"
    )
    assert stderr_of(script).endswith(" INFO x: up\n")


def test_log_lines_follow_the_process_from_stage_to_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_lines, "_about", {})
    record = logging.makeLogRecord({"name": "x", "levelname": "INFO", "msg": "done"})
    lines_are_of("mine", "sft", "rank 0")
    assert TextLines().format(record).endswith(" INFO [mine sft rank 0] x: done")
    lines_are_of("mine", "rloo")
    assert TextLines().format(record).endswith(" INFO [mine rloo] x: done")
    assert "worker" not in json.loads(JsonLines().format(record))


def test_an_unknown_format_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FORMAT_VARIABLE, "yaml")
    with pytest.raises(
        ConfigError, match="RM_ROBUST_LOG_FORMAT = 'yaml' is not a format of log lines; set it to text or json"
    ):
        start_logging()
