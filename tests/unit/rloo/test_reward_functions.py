"""Functions that users write as rewards: what they may return, what they get, and what happens when they hang."""

import asyncio
import logging
import math
import threading
import time
from collections.abc import Iterator, Sequence
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

from rm_robust.config.rloo import RewardSourceConfig
from rm_robust.errors import ConfigError, RolloutError, ScoringError
from rm_robust.rloo.reward_functions import MAX_HANGING_CALLS, FunctionSource, score_of
from rm_robust.rloo.reward_requests import CompletionAt, PromptRow, ask_in_parts, completions_of
from rm_robust.scoring.contract import ScoreInput

THIS = "tests.unit.rloo.test_reward_functions"
CALLS: list[dict[str, Any]] = []
AT_ONCE: list[int] = [0, 0]
"""How many calls run now, and the most that did."""
LOCK = threading.Lock()
MAY_END = threading.Event()


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    CALLS.clear()
    AT_ONCE[:] = [0, 0]
    MAY_END.clear()
    yield
    MAY_END.set()


# The functions of these tests.


def half_a_second(prompt: list[dict[str, str]], completion: str) -> float:
    with LOCK:
        AT_ONCE[0] += 1
        AT_ONCE[1] = max(AT_ONCE)
    time.sleep(0.5)
    with LOCK:
        AT_ONCE[0] -= 1
    return float(completion)


async def half_a_second_async(prompt: list[dict[str, str]], completion: str) -> float:
    await asyncio.sleep(0.5)
    return float(completion)


class Client:
    """A client that belongs to the event loop in which it was first used, as those of httpx and aiohttp do."""

    loop: asyncio.AbstractEventLoop | None = None


async def with_client(prompt: list[dict[str, str]], completion: str) -> float:
    loop = asyncio.get_running_loop()
    assert Client.loop in (None, loop), "another event loop"
    Client.loop = loop
    return float(completion)


def hangs_at_7(prompt: list[dict[str, str]], completion: str) -> float:
    if completion == "7":
        MAY_END.wait(30)
    return float(completion)


async def hangs_async_at_7(prompt: list[dict[str, str]], completion: str) -> float:
    if completion == "7":
        await asyncio.sleep(30)
    return float(completion)


def hangs(prompt: list[dict[str, str]], completion: str) -> float:
    MAY_END.wait(30)
    return 0.0


def right_at_third(prompt: list[dict[str, str]], completion: str) -> float:
    CALLS.append({})
    if len(CALLS) < 3:
        raise ConnectionError("reset")
    return 1.0


def exact(prompt: list[dict[str, str]], completion: str, answer: str, tests: Any = ()) -> bool:
    return completion == answer


def everything(prompt: list[dict[str, str]], completion: str, **columns: Any) -> float:
    CALLS.append(columns)
    return 0.0


def trl_lengths(completions: list[Any], **kwargs: Any) -> list[float]:
    CALLS.append(kwargs | {"completions": completions})
    return [float(len(text if isinstance(text, str) else text[0]["content"])) for text in completions]


def trl_answers(completions: list[str], answer: list[str]) -> torch.Tensor:
    return torch.tensor([float(text == right) for text, right in zip(completions, answer, strict=True)])


async def trl_async(prompts: list[str], completions: list[str], **kwargs: Any) -> list[float | None]:
    await asyncio.sleep(0)
    return [None if text == "3" else float(text) for text in completions]


def trl_raises_at_5(completions: list[str], **kwargs: Any) -> list[float]:
    return [1 / (float(text) - 5) for text in completions]


def trl_too_few(completions: list[str], **kwargs: Any) -> list[float]:
    return [0.0] * (len(completions) - 1)


def trl_one_number(completions: list[str], **kwargs: Any) -> float:
    return 0.5


def divides(prompt: list[dict[str, str]], completion: str) -> float:
    return 1 / (float(completion) - 2)


def prints(prompt: list[dict[str, str]], completion: str) -> float:
    print(f"looked at {completion}")
    return 0.0


def one_parameter(completion: str) -> float:
    return 0.0


def source(function: Any, **settings: Any) -> FunctionSource:
    config = RewardSourceConfig(name="rule", function=f"{THIS}:{function.__name__}", **settings)
    return FunctionSource(config, num_steps=10)


def asked(texts: Sequence[str], *, per_prompt: int = 0, columns: Sequence[dict[str, Any]] = ()) -> list[CompletionAt]:
    """Return the completions of one prompt, or of several with `per_prompt` completions each."""
    size = per_prompt or len(texts)
    return [
        at
        for index in range(len(texts) // size)
        for at in completions_of(
            index,
            ScoreInput(prompt=f"q{index}", completions=list(texts[index * size : (index + 1) * size])),
            PromptRow(f"p{index}", 4, dict(columns[index]) if columns else {}, [[7, k] for k in range(size)]),
        )
    ]


NUMBERS = [str(number) for number in range(8)]


# What a function may return


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (1, 1.0),
        (True, 1.0),
        (0.25, 0.25),
        (np.float32(0.5), 0.5),
        (np.int64(3), 3.0),
        (np.bool_(True), 1.0),
        (np.array(2.0), 2.0),
        (np.array([2.5]), 2.5),
        (torch.tensor(1.5), 1.5),
        (torch.tensor([1.5]), 1.5),
        (torch.tensor(1.5, dtype=torch.bfloat16, requires_grad=True), 1.5),
        (Decimal("0.75"), 0.75),
        (Fraction(1, 4), 0.25),
        (None, None),
    ],
)
def test_numbers_of_python_numpy_and_torch_are_scores_and_none_abstains(value: Any, expected: float | None) -> None:
    assert score_of(value, "f") == expected
    assert not isinstance(score_of(value, "f"), bool)


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("1.0", "f returned the text '1.0', not a number"),
        (math.nan, "f returned nan, which is not finite"),
        (np.float32("inf"), "f returned inf, which is not finite"),
        (torch.tensor(-math.inf), "f returned -inf, which is not finite"),
        ([1.0], r"f returned [1.0], not a number"),
        (torch.tensor([1.0, 2.0]), "f returned tensor([1., 2.]), not a number"),
        ({"score": 1}, "f returned {'score': 1}, not a number"),
        (1j, "f returned 1j, not a number"),
        (10**400, "not a number"),
    ],
)
def test_what_is_no_finite_number_is_a_failure_that_is_named(value: Any, reason: str) -> None:
    assert reason[-20:] in str(score_of(value, "f"))


# Calls side by side, time limits, attempts


def test_eight_calls_of_half_a_second_take_as_long_as_one_when_eight_may_run() -> None:
    started_s = time.monotonic()
    assert source(half_a_second, num_concurrent_calls=8).ask(asked(NUMBERS)).scores == [*map(float, range(8))]
    assert time.monotonic() - started_s < 1.5
    assert AT_ONCE[1] == 8


def test_no_more_calls_run_than_may_and_one_is_the_default() -> None:
    source(half_a_second).ask(asked(NUMBERS[:2]))
    assert AT_ONCE[1] == 1
    source(half_a_second, num_concurrent_calls=3).ask(asked(NUMBERS[:6]))
    assert AT_ONCE[1] == 3


def test_async_calls_run_side_by_side_in_one_event_loop() -> None:
    started_s = time.monotonic()
    assert source(half_a_second_async, num_concurrent_calls=8).ask(asked(NUMBERS)).scores == [*map(float, range(8))]
    assert time.monotonic() - started_s < 1.5
    Client.loop = None
    kept = source(with_client)
    assert kept.ask(asked(["1", "2"])).scores + kept.ask(asked(["3"])).scores == [1.0, 2.0, 3.0]
    kept.close()


@pytest.mark.parametrize("function", [hangs_at_7, hangs_async_at_7])
def test_a_call_that_hangs_is_abandoned_and_costs_its_own_score_alone(
    function: Any, caplog: pytest.LogCaptureFixture
) -> None:
    started_s = time.monotonic()
    [*others, hung] = source(function, timeout_s=0.3).ask(asked(NUMBERS)).scores
    assert time.monotonic() - started_s < 3
    assert others == [*map(float, range(7))]
    assert hung == (f"{THIS}:{function.__name__} did not answer within timeout_s = 0.3 for the prompt row 'p0' ('q0')")
    [line] = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert line.startswith(f"rule: {THIS}:{function.__name__} did not answer within timeout_s = 0.3")
    num_hanging = int(function is hangs_at_7)  # a coroutine is cancelled, a thread stays
    assert f"it is number 1, and {num_hanging} of at most {MAX_HANGING_CALLS} hang now" in line


def test_more_hanging_calls_than_may_end_the_run_with_one_line_and_do_not_keep_the_process() -> None:
    hanging = source(hangs, timeout_s=0.05, num_concurrent_calls=16)
    with pytest.raises(RolloutError, match=rf"rule.function = .*: {MAX_HANGING_CALLS + 1} calls hang; .* timeout_s"):
        hanging.ask(asked([str(number) for number in range(32)]))
    threads = [thread for thread in threading.enumerate() if thread.name == "reward function rule"]
    assert len(threads) > MAX_HANGING_CALLS
    assert all(thread.daemon for thread in threads)


def test_calls_that_end_late_do_not_count_as_hanging_for_ever() -> None:
    slow = source(hangs, timeout_s=0.05)
    for _ in range(3):
        slow.ask(asked(NUMBERS[:4]))
        MAY_END.set()
        time.sleep(0.1)
        MAY_END.clear()


def test_a_call_is_tried_again_as_often_as_the_setting_says() -> None:
    assert source(right_at_third, num_retries=2).ask(asked(["x"])).scores == [1.0]
    assert len(CALLS) == 3
    CALLS.clear()
    [reason] = source(right_at_third, num_retries=1).ask(asked(["x"])).scores
    assert "raised ConnectionError: reset" in str(reason)


# What a function gets


def test_the_columns_that_a_function_names_reach_it_so_that_rewards_can_be_verified() -> None:
    columns = [{"prompt": "q0", "answer": "4", "level": 1}, {"prompt": "q1", "answer": "6", "level": 2}]
    checked = source(exact)
    checked.check_columns({"prompt", "answer", "level"})
    assert checked.ask(asked(["4", "5", "4", "6"], per_prompt=2, columns=columns)).scores == [1.0, 0.0, 0.0, 1.0]
    source(everything).ask(asked(["4"], columns=columns))
    assert CALLS == [{"answer": "4", "level": 1}]


def test_a_column_that_the_prompts_lack_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"rule.function = .*exact' needs \['answer'\], .* columns \['level'\]"):
        source(exact).check_columns({"prompt", "level"})
    with pytest.raises(ConfigError, match=r"needs \['answer'\]"):
        source(trl_answers).check_columns({"prompt"})


def test_a_function_with_trls_signature_gets_lists_in_the_form_of_the_data_set() -> None:
    """TRL 0.29's _calculate_rewards: prompts, completions, completion_ids, trainer_state and each column as a list."""
    rows = [{"prompt": "q0", "answer": "a"}, {"prompt": [{"role": "user", "content": "q1"}], "answer": "b"}]
    assert source(trl_lengths).ask(asked(["xx", "x", "xxx", ""], per_prompt=2, columns=rows)).scores == [2, 1, 3, 0]
    [call] = CALLS
    state = call.pop("trainer_state")
    assert (state.global_step, state.max_steps) == (4, 10)
    as_messages = [{"role": "user", "content": "q1"}]
    assert call == {
        "prompts": ["q0", "q0", as_messages, as_messages],
        "completions": [
            "xx",
            "x",
            [{"role": "assistant", "content": "xxx"}],
            [{"role": "assistant", "content": ""}],
        ],
        "completion_ids": [[7, 0], [7, 1], [7, 0], [7, 1]],
        "answer": ["a", "a", "b", "b"],
    }


def test_lists_may_come_back_as_a_tensor_or_from_a_coroutine_and_with_abstentions() -> None:
    rows = [{"prompt": "q0", "answer": "5"}]
    assert source(trl_answers).ask(asked(["5", "6"], columns=rows)).scores == [1.0, 0.0]
    assert source(trl_async).ask(asked(["3", "4"], columns=rows)).scores == [None, 4.0]


def test_a_function_for_lists_gets_whole_prompts_in_as_many_calls_as_may_run() -> None:
    rows = [{"prompt": f"q{index}"} for index in range(4)]
    source(trl_lengths, num_concurrent_calls=2).ask(asked(NUMBERS, per_prompt=2, columns=rows))
    assert sorted(call["prompts"] for call in CALLS) == [["q0", "q0", "q1", "q1"], ["q2", "q2", "q3", "q3"]]


def test_a_list_that_one_completion_breaks_is_asked_for_again_in_parts() -> None:
    rows = [{"prompt": "q0"}]
    broken = source(trl_raises_at_5)
    with pytest.raises(ScoringError, match="ZeroDivisionError"):
        broken.ask(asked(NUMBERS, columns=rows))
    scores = {
        at.k: score
        for part, answer in ask_in_parts(broken.ask, asked(NUMBERS, columns=rows))
        for at, score in zip(part, answer.scores, strict=True)
    }
    assert "raised ZeroDivisionError: float division by zero for the prompt row 'p0'" in str(scores.pop(5))
    assert scores == {k: 1 / (k - 5) for k in range(8) if k != 5}


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (trl_too_few, r"returned 2 scores for 3 completions"),
        (trl_one_number, r"returned 0.5, not a list of 3 scores"),
    ],
)
def test_an_answer_that_is_no_list_of_the_right_length_is_a_failure_of_each(function: Any, reason: str) -> None:
    scores = source(function).ask(asked(["1", "2", "3"], columns=[{"prompt": "q"}])).scores
    assert len(scores) == 3
    assert all(reason in str(score) for score in scores)


def test_an_exception_names_the_function_and_the_row_and_shows_its_traceback_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    scores = source(divides).ask(asked(["1", "2", "2"])).scores
    assert scores[0] == -1.0
    assert scores[1] == scores[2]
    assert scores[1] == (
        f"{THIS}:divides raised ZeroDivisionError: float division by zero for the prompt row 'p0' ('q0')"
    )
    assert [record.exc_info is not None for record in caplog.records] == [True]


def test_what_a_function_prints_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    source(prints, num_concurrent_calls=4).ask(asked(["1", "2"]))
    assert sorted(capsys.readouterr().out.splitlines()) == ["looked at 1", "looked at 2"]


def test_a_function_without_room_for_prompt_and_completion_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"is one_parameter\(completion: str\) -> float\. Give it the parameters"):
        source(one_parameter)
