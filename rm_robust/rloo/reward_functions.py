"""Call the reward functions that users write: bounded in time, several at once, with every failure named and counted.

    completions ─► calls (one a completion, or whole lists as TRL makes them) ─► a thread each ─► scores

A function has one of two signatures:

    function(prompts, completions, completion_ids, trainer_state, **columns) -> [score, ...]     as in TRL
    function(prompt, completion, **columns) -> score

A score is any number, or None to abstain. An async function is awaited in an event loop that the source keeps. A call
that does not answer in time is abandoned. Python cannot end its thread, so the thread stays, as a daemon that the end
of the process does not wait for. Too many of them end the run.
"""

import asyncio
import copy
import importlib
import inspect
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from transformers.trainer_callback import TrainerState

from rm_robust.config.rloo import RewardSourceConfig
from rm_robust.data.records import Message
from rm_robust.errors import ConfigError, RolloutError, ScoringError
from rm_robust.rloo.reward_requests import Answer, CompletionAt

logger = logging.getLogger(__name__)

MAX_HANGING_CALLS = 8
"""Most calls of one function that may hang at the same time. If there is one more, the run ends."""
ENDS_WITHIN_S = 0.2
"""Seconds in which the thread of an abandoned call ends where it does not hang: it waited for an async function."""
RESERVED = ("prompt", "prompts", "completion", "completions", "completion_ids", "trainer_state")
"""The names that a column cannot have as an argument. TRL leaves out columns of these names too."""
PASSED_TO_LISTS = ("prompts", "completions", "completion_ids", "trainer_state")
NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)

RewardFunction = Callable[..., Any]


def load_function(source: RewardSourceConfig) -> RewardFunction:
    """Import `package.module:function`. Raises ConfigError when it does not exist or cannot be called."""
    assert source.function is not None
    label = label_of(source)
    module, _, name = source.function.partition(":")
    try:
        function = getattr(importlib.import_module(module), name)
    except Exception as error:
        raise ConfigError(
            f'{label} cannot be imported ({type(error).__name__}: {error}). Write "package.module:function", and '
            "install the package or add its folder to PYTHONPATH."
        ) from error
    if not callable(function):
        raise ConfigError(
            f"{label} is {function!r:.100}, which cannot be called. Name a function(prompt, completion) -> float, or "
            "one with TRL's signature, function(prompts, completions, **columns) -> list of floats."
        )
    if not (Signature.of(function).takes_lists or takes_two_positions(function)):
        raise ConfigError(
            f"{label} is {name}{inspect.signature(function)}. Give it the parameters (prompt, completion), or TRL's "
            "(prompts, completions, **columns)."
        )
    return function  # type: ignore[no-any-return]


def takes_two_positions(function: RewardFunction) -> bool:
    """Return whether a function takes a prompt and a completion by position, as one without a signature may."""
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):
        return True
    num_positions = sum(p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in parameters)
    return num_positions >= 2 or any(p.kind is p.VAR_POSITIONAL for p in parameters)


def label_of(source: RewardSourceConfig) -> str:
    """Return how messages name the setting."""
    return f"rloo.reward_sources: {source.name}.function = {source.function!r}"


@dataclass(frozen=True)
class Signature:
    """What a reward function takes beside the texts."""

    takes_lists: bool
    """Whether it has TRL's signature: it gets all completions of a call as lists, by keyword."""
    columns: frozenset[str]
    """The names of its further parameters, each of which is a column of the prompts' rows."""
    required: frozenset[str]
    """Those of `columns` that have no default."""
    takes_every_column: bool
    """Whether it has a `**` parameter."""
    lists: frozenset[str] = frozenset()
    """Those of PASSED_TO_LISTS that it takes (TRL's signature only)."""

    @classmethod
    def of(cls, function: RewardFunction) -> "Signature":
        """Read a function's parameters. A builtin without a readable signature gets prompt and completion alone."""
        try:
            parameters = list(inspect.signature(function).parameters.values())
        except (TypeError, ValueError):
            return cls(False, frozenset(), frozenset(), False)
        takes_every_column = any(p.kind is p.VAR_KEYWORD for p in parameters)
        named = [p for p in parameters if p.kind in NAMED]
        has_positions = any(p.kind in (p.POSITIONAL_ONLY, p.VAR_POSITIONAL) for p in parameters)
        takes_lists = any(p.name == "completions" for p in named) or (
            takes_every_column and not named and not has_positions
        )
        lists = frozenset(PASSED_TO_LISTS if takes_every_column else {p.name for p in named} & {*PASSED_TO_LISTS})
        if takes_lists:
            columns = [p for p in named if p.name not in PASSED_TO_LISTS]
        else:
            positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)][:2]
            columns = [p for p in named if p not in positional]
        required = frozenset(p.name for p in columns if p.default is p.empty)
        return cls(takes_lists, frozenset(p.name for p in columns), required, takes_every_column, lists)

    def chosen(self, columns: dict[str, Any]) -> dict[str, Any]:
        """Return the columns of one row that the function takes, as copies that it may change."""
        return copy.deepcopy(
            {
                name: value
                for name, value in columns.items()
                if name not in RESERVED and (self.takes_every_column or name in self.columns)
            }
        )


class FunctionSource:
    """Asks one reward function for scores. Its calls may run side by side, and none lasts longer than `timeout_s`."""

    def __init__(self, source: RewardSourceConfig, *, num_steps: int) -> None:
        """Import the function. Raises ConfigError when that fails. `num_steps` is what TRL's trainer state says."""
        self.name, self._source, self._function = source.name, source, load_function(source)
        self._signature = Signature.of(self._function)
        self._num_steps = num_steps
        self._num_concurrent = source.num_concurrent_calls or 1
        self._loop: asyncio.AbstractEventLoop | None = None
        self._lock = threading.Lock()
        self._hanging: list[threading.Thread] = []
        self._num_abandoned = 0
        self._has_shown_traceback = False

    def check_columns(self, names: set[str]) -> None:
        """Raise ConfigError when the function needs a column that the rows of the prompts do not have."""
        given = names - {*RESERVED}
        missing = sorted(self._signature.required - given)
        if missing:
            raise ConfigError(
                f"{label_of(self._source)} needs {missing}, and beside the prompt the rows of the RLOO prompts have "
                f"the columns {sorted(given)}. Add them to data.rloo_prompts, or give these parameters a default."
            )

    def ask(self, completions: Sequence[CompletionAt]) -> Answer:
        """Return a score, a reason or None (it abstains) for each completion, in order.

        Raises ScoringError when a call with several completions fails, so that they are asked for again in parts, and
        RolloutError when more than MAX_HANGING_CALLS calls hang.
        """
        calls = self._calls_of(completions)
        waiting, running = deque(calls), dict[Future[Any], Call]()
        while running or (waiting and not any(call.error for call in calls)):
            while waiting and len(running) < self._num_concurrent:
                call = waiting.popleft()
                running[self._start(call)] = call
            first_deadline_s = min(call.deadline_s for call in running.values())
            done, _ = wait(running, max(0.0, first_deadline_s - time.monotonic()), FIRST_COMPLETED)
            late = {future for future, call in running.items() if call.deadline_s <= time.monotonic()} - done
            for future in done | late:
                call = running.pop(future)
                if not (self._abandoned(call) if future in late else self._taken(call, future)):
                    waiting.append(call)
        for call in calls:
            if call.error is not None:
                raise call.error
        return Answer([score for call in calls for score in call.scores], None)

    def close(self) -> None:
        """End the event loop of an async function, without waiting for it."""
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._loop.stop)

    def _calls_of(self, completions: Sequence[CompletionAt]) -> "list[Call]":
        if not self._signature.takes_lists:
            return [Call([at]) for at in completions]
        prompts = [list(group) for _, group in groupby(completions, key=lambda at: at.index)]
        num_calls = min(self._num_concurrent, len(prompts))
        bounds = [len(prompts) * number // num_calls for number in range(num_calls + 1)]
        return [
            Call([at for prompt in prompts[start:end] for at in prompt])
            for start, end in zip(bounds, bounds[1:], strict=False)
        ]

    def _start(self, call: "Call") -> Future[Any]:
        """Begin an attempt in a thread of its own, which a hanging function can keep."""
        future: Future[Any] = Future()

        def work() -> None:
            try:
                future.set_result(self._value_of(call.completions))
            except BaseException as error:  # the source's thread raises it
                future.set_exception(error)

        call.num_attempts += 1
        call.deadline_s = time.monotonic() + self._source.timeout_s
        call.thread = threading.Thread(target=work, name=f"reward function {self._source.name}", daemon=True)
        call.thread.start()
        return future

    def _value_of(self, completions: Sequence[CompletionAt]) -> Any:
        """Call the function with its arguments, and wait for its answer if it is async."""
        columns = [self._signature.chosen(at.row.columns) for at in completions]
        if self._signature.takes_lists:
            lists = {
                "prompts": [prompt_as_given(at) for at in completions],
                "completions": [completion_as_given(at) for at in completions],
                "completion_ids": [list(at.row.completion_ids[at.k]) for at in completions],
                "trainer_state": TrainerState(global_step=completions[0].row.step, max_steps=self._num_steps),
            }
            value = self._function(
                **{name: value for name, value in lists.items() if name in self._signature.lists},
                **{name: [row[name] for row in columns] for name in columns[0]},
            )
        else:
            [at] = completions
            value = self._function(messages_of(at), at.item.completions[at.k], **columns[0])
        if not inspect.isawaitable(value):
            return value
        waiting = asyncio.run_coroutine_threadsafe(_finished(value), self._running_loop())
        try:
            return waiting.result(self._source.timeout_s)
        finally:
            waiting.cancel()

    def _running_loop(self) -> asyncio.AbstractEventLoop:
        """Return the source's event loop. All calls share it, because clients that a function keeps belong to one."""
        with self._lock:
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                name = f"event loop of reward function {self._source.name}"
                threading.Thread(target=_run_until_stopped, args=(self._loop,), name=name, daemon=True).start()
            return self._loop

    def _taken(self, call: "Call", future: Future[Any]) -> bool:
        """Store the scores of a call that has ended, or why it has none. Returns False when it must be tried again."""
        error = future.exception()
        if error is None:
            call.scores = self._scores_of(call, future.result())
            return True
        if isinstance(error, TimeoutError) and call.deadline_s <= time.monotonic():
            return self._abandoned(call)
        if not isinstance(error, Exception):
            raise error
        if call.num_attempts <= (self._source.num_retries or 0):
            return False
        reason = f"{self._source.function} raised {type(error).__name__}: {error} for {call.shown}"
        if not self._has_shown_traceback:
            self._has_shown_traceback = True
            logger.warning("%s: %s. The traceback is shown once.", self._source.name, reason, exc_info=error)
        call.scores = [reason]
        call.error = ScoringError(reason) if len(call.completions) > 1 else None
        return True

    def _abandoned(self, call: "Call") -> bool:
        """Give up an attempt that has not answered in time. Returns False when the call must be tried again.

        Raises RolloutError when too many hang.
        """
        self._num_abandoned += 1
        assert call.thread is not None
        call.thread.join(ENDS_WITHIN_S)
        self._hanging = [thread for thread in [*self._hanging, call.thread] if thread.is_alive()]
        reason = f"{self._source.function} did not answer within timeout_s = {self._source.timeout_s:g}"
        logger.warning(
            "%s: %s for %s. The call is abandoned; it is number %d, and %d of at most %d hang now.",
            *(self._source.name, reason, call.shown, self._num_abandoned, len(self._hanging), MAX_HANGING_CALLS),
        )
        if len(self._hanging) > MAX_HANGING_CALLS:
            raise RolloutError(
                f"{label_of(self._source)}: {len(self._hanging)} calls hang; {MAX_HANGING_CALLS} may. The last one: "
                f"{reason} for {call.shown}. Give what the function waits for a time limit of its own, or raise "
                "timeout_s; the same command resumes."
            )
        if call.num_attempts <= (self._source.num_retries or 0):
            return False
        call.scores = [f"{reason} for {call.shown}"] * len(call.completions)
        return True

    def _scores_of(self, call: "Call", value: Any) -> list[float | str | None]:
        where, count = f"{self._source.function} for {call.shown}", len(call.completions)
        if not self._signature.takes_lists:
            return [score_of(value, where)]
        if isinstance(value, str | bytes | dict) or not hasattr(value, "__iter__") or not hasattr(value, "__len__"):
            return [f"{where} returned {value!r:.100}, not a list of {count} scores"] * count
        try:
            values = list(value)
        except TypeError:  # a tensor without dimensions has both methods
            return [f"{where} returned {value!r:.100}, not a list of {count} scores"] * count
        if len(values) != count:
            return [f"{where} returned {len(values)} scores for {count} completions"] * count
        return [
            score_of(one, f"{self._source.function} for {Call([at]).shown}")
            for one, at in zip(values, call.completions, strict=True)
        ]


class Call:
    """One call of a function, its attempts and its scores."""

    def __init__(self, completions: list[CompletionAt]) -> None:
        self.completions = completions
        self.num_attempts = 0
        self.deadline_s = math.inf
        self.thread: threading.Thread | None = None
        self.scores: list[float | str | None] = []
        self.error: ScoringError | None = None
        """Why a call with several completions failed, each of which is to be asked for again in a smaller call."""

    @property
    def shown(self) -> str:
        """The first prompt's row, as messages name it."""
        at = self.completions[0]
        text = f"the prompt row {at.row.prompt_id!r} ({messages_of(at)[-1]['content']!r:.60})"
        num_others = len(self.completions) - 1
        return f"{text} and {num_others} more completions" if num_others else text


def messages_of(at: CompletionAt) -> list[Message]:
    """Return a copy of the prompt's messages, which a function may change."""
    prompt = at.item.prompt
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [dict(message) for message in prompt]


def prompt_as_given(at: CompletionAt) -> Any:
    """Return the prompt as its row has it, text or messages; TRL gives functions the form of the data set."""
    return at.row.columns["prompt"] if isinstance(at.row.columns.get("prompt"), str) else messages_of(at)


def completion_as_given(at: CompletionAt) -> str | list[Message]:
    """Return the completion in the form of its prompt: text, or a list of one assistant message."""
    text = at.item.completions[at.k]
    return text if isinstance(prompt_as_given(at), str) else [{"role": "assistant", "content": text}]


def score_of(value: Any, where: str) -> float | str | None:
    """Return what a function returned as a float, None where it abstains, or a text that says why it is no score.

    Numbers of Python, NumPy and torch are scores, also bools and arrays with one element.
    """
    if value is None:
        return None
    if isinstance(value, str | bytes):
        return f"{where} returned the text {value!r:.100}, not a number"
    try:
        number = float(value.item() if hasattr(value, "item") else value)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        return f"{where} returned {value!r:.100}, not a number"
    return number if math.isfinite(number) else f"{where} returned {number}, which is not finite"


async def _finished(value: Awaitable[Any]) -> Any:
    return await value


def _run_until_stopped(loop: asyncio.AbstractEventLoop) -> None:
    """Run an event loop; after its end, cancel what was not finished and close it."""
    asyncio.set_event_loop(loop)
    loop.run_forever()
    tasks = asyncio.all_tasks(loop)
    for task in tasks:
        task.cancel()
    loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
    loop.close()
