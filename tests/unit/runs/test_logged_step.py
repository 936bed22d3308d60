"""A reader of log lines finds in a step's line what log_step wrote, and nothing in any other line."""

import logging

import pytest

from rm_robust.runs.metrics import LoggedStep, log_step, parse_logged_step


def test_a_step_is_parsed_to_what_was_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        log_step(logging.getLogger("x"), "sft", 3, 9, {"sft/loss": 0.5}, ["sft/loss", "sft/eval_loss"])
    (record,) = caplog.records
    assert parse_logged_step(record.getMessage()) == LoggedStep(3, 9, {"loss": "0.5"})


@pytest.mark.parametrize(
    "message",
    [
        "train step 3/10 " + "=" * 5000 + " done",
        "step 3 of 9",
        "sft step 3/9 of a user's own",
        "a step 1/2 http://x/?" + "&".join(f"a{i}=1" for i in range(500)) + " end",
    ],
)
@pytest.mark.timeout(10)
def test_any_other_line_is_none(message: str) -> None:
    assert parse_logged_step(message) is None
