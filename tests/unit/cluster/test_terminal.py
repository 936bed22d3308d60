"""The terminal shows a line for each stage and every warning; the log has every line of every process."""

import contextlib
import importlib
import io
import json
import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from ray._private import worker
from ray._private.ray_logging import global_worker_stdstream_dispatcher
from ray.autoscaler.v2 import utils as autoscaler_utils

from rm_robust.cluster import log_lines, terminal, worker_lines
from rm_robust.cluster.log_lines import LogLine, TextLines, line_of, lines_are_of, parse_text_line
from rm_robust.cluster.stage_view import StageView
from rm_robust.cluster.terminal import BEGINS, Terminal
from rm_robust.errors import ConfigError
from rm_robust.runs.metrics import LoggedStep, MetricsWriter, log_stage, log_step

logger = logging.getLogger("rm_robust.some_module")


class Watched(io.StringIO):
    """A stream that is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def _own_logging(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(log_lines, "_about", {})
    level = logging.getLogger().level
    yield
    logging.getLogger().setLevel(level)


def step_of_a_worker(stage: str, step: int, *, at_s: float = 1.8e9) -> str:
    """Return the line that a worker logs after a step, at this Unix time."""
    records: list[logging.LogRecord] = []
    worker = logging.Logger("rm_robust.training.loop")
    handler = logging.Handler()
    handler.emit = records.append  # type: ignore[method-assign]
    worker.addHandler(handler)
    log_step(worker, stage, step, 9, {f"{stage}/loss": 1 / step}, [f"{stage}/loss", f"{stage}/eval_loss"])
    records[0].created, records[0].msecs = at_s, 1000 * (at_s % 1)
    return TextLines().format(records[0])


def test_a_text_line_is_parsed_to_what_it_was_made_of() -> None:
    lines_are_of("mine/bt_twin", "reward_model", "rank 1")
    record = logging.makeLogRecord(
        {"name": "rm_robust.x", "levelno": logging.WARNING, "levelname": "WARNING", "msg": "a [b] c: %d", "args": (3,)}
    )
    parsed = parse_text_line(TextLines().format(record))
    assert parsed == LogLine(logging.WARNING, "mine/bt_twin", "reward_model", "rm_robust.x", "a [b] c: 3", 0.0)
    assert parsed == line_of(record)
    assert parsed is not None
    assert parsed.time_s == pytest.approx(record.created, abs=1e-3)
    assert parse_text_line("WARNING 12-01 02:07:40 [vllm.py:12] not ours") is None


def test_where_nobody_watches_a_stage_prints_its_line_now_and_then_and_its_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock_s = [100.0]
    monkeypatch.setattr(terminal.time, "monotonic", lambda: clock_s[0])
    shown = io.StringIO()
    with Terminal(is_verbose=False, stream=shown) as screen:
        logger.info("before the log has a place")
        screen.log_to(tmp_path / "logs" / "run.log")
        lines_are_of("mine", "sft")
        log_stage("sft", BEGINS)
        for step in range(1, 9):
            screen.take_worker_line("(RayTrainWorker pid=7) ", step_of_a_worker("sft", step, at_s=1.8e9 + 4 * step))
            screen.draw()
            clock_s[0] += 4
        screen.take_worker_line("(Engine pid=8) ", "a banner of vLLM")
        log_stage("sft", "done in 32 s")
        log_stage("preferences", BEGINS)
        log_stage("sft", "already committed, skipped")  # by a driver that Ray has started again
    assert shown.getvalue().splitlines() == [
        f"every log line goes to {tmp_path}/logs/run.log",
        "sft                    step 5 of 9, about 16 s left, loss 0.2",
        "sft                    done in 32 s, loss 0.125",
        "stage sft: already committed, skipped",
    ]
    log = (tmp_path / "logs" / "run.log").read_text()
    assert log.index("before the log has a place") < log.index("(RayTrainWorker pid=7) ") < log.index("vLLM")
    assert log.count("sft step") == 8


def test_a_warning_of_any_process_is_shown_once_and_repeats_are_counted(tmp_path: Path) -> None:
    shown = io.StringIO()
    record = logging.makeLogRecord({"name": "rm_robust.x", "levelname": "ERROR", "msg": "an engine is lost"})
    with Terminal(is_verbose=False, stream=shown) as screen:
        screen.log_to(tmp_path / "run.log")
        for _ in range(3):
            screen.take_worker_line("(Engine pid=8) ", TextLines().format(record))
        logger.warning("the disk is nearly full")
        logger.info("nobody needs this")
    assert shown.getvalue().splitlines()[1:] == [
        "error: an engine is lost",
        "warning: the disk is nearly full",
        f"2 repeated warnings are in {tmp_path}/run.log",
    ]


@pytest.mark.parametrize("library", ["ray", "ray.data", "ray.serve"])
def test_what_ray_logs_here_goes_to_the_log_and_its_warnings_to_the_terminal(
    library: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    importlib.import_module(library)  # this sets up its printing
    log = logging.getLogger(library).getChild("some_module")
    with Terminal(is_verbose=False) as screen:
        screen.log_to(tmp_path / "run.log")
        log.warning("no CPU is free")
        log.info("a detail")
    assert capfd.readouterr().err.splitlines()[1:] == ["warning: no CPU is free"]
    assert "a detail" in (tmp_path / "run.log").read_text()


def test_verbose_prints_every_line(tmp_path: Path) -> None:
    shown = io.StringIO()
    with Terminal(is_verbose=True, stream=shown) as screen:
        screen.log_to(tmp_path / "run.log")
        logger.info("a detail")
        screen.take_worker_line("(Engine pid=8) ", "a banner")
    assert "a detail" in shown.getvalue()
    assert shown.getvalue() == (tmp_path / "run.log").read_text()
    assert "(Engine pid=8) a banner\n" in shown.getvalue()


def test_json_lines_are_all_printed_and_an_unknown_format_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = io.StringIO()
    monkeypatch.setenv(log_lines.FORMAT_VARIABLE, "json")
    with Terminal(is_verbose=False, stream=shown) as screen:
        logger.info("a detail")
        screen.take_worker_line("(Engine pid=8) ", '{"worker": "engine 0", "message": "up"}')
    assert [json.loads(line)["message"] for line in shown.getvalue().splitlines()] == ["a detail", "up"]
    monkeypatch.setenv(log_lines.FORMAT_VARIABLE, "yaml")
    with pytest.raises(ConfigError, match="RM_ROBUST_LOG_FORMAT = 'yaml'"):
        Terminal(is_verbose=False)


def test_a_bar_is_drawn_in_place_for_a_person_and_gone_when_the_stage_is_done(tmp_path: Path) -> None:
    shown = Watched()
    with Terminal(is_verbose=False, stream=shown) as screen:
        screen.log_to(tmp_path / "run.log")
        lines_are_of("mine/bt_twin", "reward_model")
        log_stage("reward_model", BEGINS)
        screen.take_worker_line("", f"{step_of_a_worker('reward_model', 3)}")
        screen.draw()
        assert "\n" not in shown.getvalue().partition("run.log\n")[2]
        log_stage("reward_model", "done in 7 s")
    drawn, _, last = shown.getvalue().rpartition("\r")
    assert re.search(r"\rbt_twin/reward_model   \S+ *step 3 of 9, loss 0.3333", drawn)
    assert last == "bt_twin/reward_model   done in 7 s, loss 0.3333\n"


def test_the_time_left_is_by_the_median_of_the_latest_steps_and_not_by_when_their_lines_came() -> None:
    view = StageView("sft", "sft", begun_at_s=0.0, printed_at_s=0.0)
    ended_at_s = [1000 + 2.0 * step + (60 if step > 4 else 0) for step in range(1, 8)]  # one of them took a minute more
    for step, at_s in enumerate(ended_at_s, start=1):
        view.take(LoggedStep(step, 107, {}), at_s)
    assert view.text(3.0) == "step 7 of 107, about 3 min 20 s left"  # 100 steps of 2 s, though all lines came at once


def test_a_stage_that_goes_on_says_from_which_step(tmp_path: Path) -> None:
    shown = io.StringIO()
    with Terminal(is_verbose=False, stream=shown) as screen:
        screen.log_to(tmp_path / "run.log")
        lines_are_of("mine", "reward_model", "rank 0")
        MetricsWriter(tmp_path / "new", "reward_model", 0, num_steps=1250).close()
        MetricsWriter(tmp_path / "old", "reward_model", 950, num_steps=1250).close()
    assert shown.getvalue().splitlines()[1:] == ["stage reward_model: goes on from step 950 of 1250"]


def test_a_log_that_cannot_be_written_is_said_once_and_does_not_end_the_run(tmp_path: Path) -> None:
    shown = io.StringIO()
    (tmp_path / "logs").write_text("a file is in the way")
    with Terminal(is_verbose=False, stream=shown) as screen:
        screen.log_to(tmp_path / "logs" / "run.log")
        logger.info("one")
        logger.info("two")
    assert shown.getvalue().count("from here on, log lines are lost") == 1


def test_after_the_run_logging_is_as_before() -> None:
    root = logging.getLogger()
    before = (root.handlers[:], root.level)
    with Terminal(is_verbose=False, stream=io.StringIO()):
        assert root.handlers != before[0]
    assert (root.handlers, root.level) == before
    assert worker_lines.is_taken() is False


@pytest.mark.parametrize(
    ("prefix", "text", "news"),
    [
        ("(autoscaler) ", "No node type can fulfill {'GPU': 8}", "No node type"),
        ("(raylet) ", "[2026-12-01 02:38:07,459 E 17 17] (raylet) worker_pool.cc:660: not registered", "[2026-12-01"),
        ("(raylet) ", "[2026-12-01 02:38:07,459 W 17 17] gcs_client.cc:210: a warning", None),
        ("(Engine pid=8) ", "2026-01-01 00:00:00,123 TRACE x: a level of its own", None),
        ("(Engine pid=8) ", "[2026-12-01 02:38:07,459 E 17 17] an error of a library", None),
    ],
)
def test_ray_says_why_a_run_waits(prefix: str, text: str, news: str | None, tmp_path: Path) -> None:
    shown = io.StringIO()
    with Terminal(is_verbose=False, stream=shown) as screen:
        screen.log_to(tmp_path / "run.log")
        screen.take_worker_line(prefix, text)
    lines = shown.getvalue().splitlines()[1:]
    assert len(lines) == (0 if news is None else 1)
    assert news is None or lines[0].startswith(prefix + news)
    assert prefix + text in (tmp_path / "run.log").read_text()


def test_of_the_autoscalers_lines_only_events_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(autoscaler_utils, "cached_is_autoscaler_v2", False)  # what Ray would look up in its cluster
    monkeypatch.setattr(worker, "autoscaler_log_fyi_printed", True)  # a tip that Ray gives once
    taken: list[str] = []
    worker_lines.take_over(lambda prefix, text: taken.append(prefix + text))
    lines = ["2026-12-01 INFO a.py -- The autoscaler took 1 s", "2026-12-01 INFO b.py -- :event_summary:No node fits"]
    global_worker_stdstream_dispatcher.add_handler(__name__, worker_lines.take_batch)
    global_worker_stdstream_dispatcher.emit({"pid": "autoscaler", "lines": lines})
    global_worker_stdstream_dispatcher.emit({"pid": 7, "actor_name": "A", "ip": "a", "localhost": "b", "lines": ["up"]})
    global_worker_stdstream_dispatcher.remove_handler(__name__)
    worker_lines.take_over(None)
    assert taken == ["(autoscaler) No node fits", "(A pid=7, ip=a) up"]


def test_a_reader_that_has_gone_does_not_end_the_run(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    stream = open(writing, "w")  # noqa: SIM115
    with Terminal(is_verbose=True, stream=stream) as screen:
        screen.log_to(tmp_path / "run.log")
        logger.info("a detail")
    with contextlib.suppress(BrokenPipeError):  # what it has not written yet
        stream.close()
    assert "a detail" in (tmp_path / "run.log").read_text()
