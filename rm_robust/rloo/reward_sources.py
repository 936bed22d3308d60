"""Ask the proxy, the gold judge and the other reward sources for scores as completions finish.

    submit ─► each reward source has a queue and a thread: take all that wait, score them in one call, repeat ─► collect

Batches form by themselves while a call is running. No source waits for another, and each makes one call at a time. A
call that fails is made again in parts, so that only completions that fail alone have no score. When a source does not
answer in spite of all retries, it is not asked about the same completions again.
"""

import contextlib
import importlib
import logging
import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from queue import SimpleQueue
from typing import Self

from rm_robust.config.rloo import RewardSourceConfig, RlooConfig
from rm_robust.data.records import Message
from rm_robust.errors import ConfigError, RolloutError, ScorerUnavailableError, ScoringError
from rm_robust.rloo.advantages import StepScores, weighted_scores
from rm_robust.scoring.client import RewardClient
from rm_robust.scoring.contract import ScoreInput, Scorer

logger = logging.getLogger(__name__)

GATHER_S = 0.005
"""Seconds that a call waits after its first prompt, because the completions of several prompts finish together."""
NUM_PARTS = 4
"""Number of parts that a failed call is split into.

With two parts, as many calls would find one bad completion, but the good ones beside it would be scored more often.
"""
CLOSED_WITHIN_S = 5.0
"""Seconds that `close` waits for the threads to end."""

RewardFunction = Callable[[list[Message], str], float]


@dataclass(frozen=True)
class Answer:
    """The answer of a reward source: one score for each completion, in order, or a text that says why it has none.

    `checkpoint` is that of a served source; functions have none.
    """

    scores: list[float | str]
    checkpoint: str | None


Ask = Callable[[Sequence[ScoreInput]], Answer]
"""A call to a reward source; it raises ScoringError when there is no answer at all."""


class RewardSources:
    """Gets the scores of steps, several at a time where sampling runs ahead of training.

    Every reward source has a thread of its own, which `close` ends.
    """

    def __init__(self, settings: RlooConfig, *, proxy: Scorer, gold: Scorer | None) -> None:
        """Open all reward sources and start their threads.

        Raises ConfigError for a function that cannot be imported or called, a URL that is not HTTP, two sources with
        the same name, and when every weight is 0.
        """
        self._settings = settings
        self._weights = {"proxy": settings.proxy_weight} | {
            source.name: source.weight for source in settings.reward_sources
        }
        if len(self._weights) <= len(settings.reward_sources):
            raise ConfigError(
                f"rloo.reward_sources: names must differ, got {[source.name for source in settings.reward_sources]}."
            )
        if not any(self._weights.values()):
            raise ConfigError(
                "The reward would always be 0: rloo.proxy_weight and all of rloo.reward_sources have the weight 0, "
                f"got {self._weights}."
            )
        asks: dict[str, Ask] = {"proxy": partial(ask_scorer, proxy)}
        with contextlib.ExitStack() as clients:
            asks |= {source.name: open_source(source, clients) for source in settings.reward_sources}
            if gold is not None:
                asks["gold"] = partial(ask_scorer, gold)
            self._clients = clients.pop_all()
        self._begun: set[StepInProgress] = set()
        self._sources = {name: SourceThread(name, ask) for name, ask in asks.items()}

    def begin(self, *, with_gold: bool) -> "StepInProgress":
        """Begin a step and return it; then `submit` its prompts and `collect` its scores."""
        assert not with_gold or "gold" in self._sources, "there is no judge"
        names = [name for name in self._sources if with_gold or name != "gold"]
        num_completions = self._settings.num_prompts_per_step * self._settings.num_completions_per_prompt
        step = StepInProgress(names, num_completions, self._settings.max_failed_score_fraction)
        self._begun.add(step)
        return step

    def submit(self, step: "StepInProgress", index: int, item: ScoreInput) -> None:
        """Ask for the scores of prompt `index` of the step, in any order but each once.

        Returns at once; may be called from any thread.
        """
        step.expect(index, item)
        for name in step.scores:
            self._sources[name].queue.put(Job(step, index, item))

    def collect(self, step: "StepInProgress", count: int) -> StepScores:
        """Wait until each score of prompts 0 to count - 1 is there or has failed, and return the scores.

        Raises RolloutError when more than `max_failed_score_fraction` of the step's completions have no score from one
        source (the gold judge included), as soon as that is certain, or when more than that have no reward.
        """
        try:
            step.wait_for(count)
            scores = self._scores_of(step)
        finally:
            self.abandon(step)
        for name, num_failed in scores.num_failed.items():
            if num_failed:
                logger.warning(
                    "%d of %d scores of %s failed; the last one: %s",
                    num_failed,
                    scores.rewards_PK.numel(),
                    name,
                    step.last_reason[name],
                )
        num_lost, num_completions = int(scores.rewards_PK.isnan().sum()), scores.rewards_PK.numel()
        if num_lost / num_completions > step.max_failed_fraction:
            failed = {name: number for name, number in scores.num_failed.items() if number and name != "gold"}
            reasons = "; ".join(step.last_reason[name] for name in failed)
            raise too_many_failed(
                " and ".join(failed),
                num_lost,
                of=num_completions,
                max_fraction=step.max_failed_fraction,
                reason=reasons,
            )
        return scores

    def abandon(self, step: "StepInProgress") -> None:
        """Forget the step's prompts. Running calls are not interrupted, but their answers are dropped."""
        step.end(None)
        self._begun.discard(step)

    def close(self) -> None:
        """End the threads. A thread whose call outlasts CLOSED_WITHIN_S ends after the call, or with the process."""
        for step in tuple(self._begun):
            self.abandon(step)
        for source in self._sources.values():
            source.queue.put(None)
        deadline_s = time.monotonic() + CLOSED_WITHIN_S
        for source in self._sources.values():
            source.thread.join(max(0.0, deadline_s - time.monotonic()))
        self._clients.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _scores_of(self, step: "StepInProgress") -> StepScores:
        rows = {name: step.rows(name) for name in step.scores}
        gold = rows.pop("gold", None)
        return StepScores(
            source_scores=rows,
            gold=gold,
            rewards_PK=weighted_scores(rows, self._weights),
            num_failed={name: step.num_failed[name] for name in step.scores},
            checkpoints=step.checkpoints,
            num_checkpoint_changes=step.num_checkpoint_changes,
        )


class StepInProgress:
    """The prompts and scores of one step so far, shared by the controller's thread and the sources' threads."""

    def __init__(self, names: list[str], num_completions: int, max_failed_fraction: float) -> None:
        """Begin with no prompts; `names` are the reward sources that are asked."""
        self.num_completions, self.max_failed_fraction = num_completions, max_failed_fraction
        self.changed = threading.Condition()
        self.is_over = False
        self.error: BaseException | None = None
        self.inputs: dict[int, ScoreInput] = {}
        self.num_missing = 0
        self.scores: dict[str, dict[tuple[int, int], float]] = {name: {} for name in names}
        self.num_failed: Counter[str] = Counter()
        self.last_reason: dict[str, str] = {}
        self.checkpoints: dict[str, str] = {}
        self.num_checkpoint_changes = 0

    def expect(self, index: int, item: ScoreInput) -> None:
        """Expect one score from each source for each completion of prompt `index`."""
        with self.changed:
            assert index not in self.inputs, f"prompt {index} is submitted twice"
            self.inputs[index] = item
            self.num_missing += len(self.scores) * len(item.completions)

    def put(self, name: str, completions: "Sequence[CompletionAt]", scores: Sequence[float | str]) -> None:
        """Store the scores of source `name`; end the step when this source has failed too often."""
        with self.changed:
            for completion, score in zip(completions, scores, strict=True):
                if isinstance(score, str):
                    self.num_failed[name] += 1
                    self.last_reason[name] = score
                self.scores[name][completion.index, completion.k] = math.nan if isinstance(score, str) else score
            self.num_missing -= len(completions)
            if self.num_failed[name] / self.num_completions > self.max_failed_fraction:
                num_failed, reason = self.num_failed[name], self.last_reason[name]
                self.end(
                    too_many_failed(
                        name, num_failed, of=self.num_completions, max_fraction=self.max_failed_fraction, reason=reason
                    )
                )
            self.changed.notify_all()

    def note_checkpoint(self, name: str, checkpoint: str, *, is_change: bool) -> None:
        """Store the checkpoint that source `name` scores with, and count it if it is a change."""
        with self.changed:
            self.checkpoints[name] = checkpoint
            self.num_checkpoint_changes += is_change

    def end(self, error: BaseException | None) -> None:
        """End the step, so that no source is asked about it any more; `wait_for` raises `error`."""
        with self.changed:
            self.is_over = True
            self.error = self.error or error
            self.changed.notify_all()

    def wait_for(self, count: int) -> None:
        """Wait until `count` prompts have all their scores or failures. Raises the error that ended the step."""
        with self.changed:
            self.changed.wait_for(lambda: self.is_over or (len(self.inputs) >= count and self.num_missing == 0))
            if self.error is not None:
                raise self.error
            assert not self.is_over, "the step was abandoned while its scores were awaited"
            assert self.inputs.keys() == set(range(count)), (
                f"prompts 0 to {count - 1} must be submitted, got {sorted(self.inputs)}"
            )

    def rows(self, name: str) -> list[list[float]]:
        """Return the scores of source `name`, [P][K], in the order of the prompts' indices."""
        return [
            [self.scores[name][index, k] for k in range(len(self.inputs[index].completions))]
            for index in sorted(self.inputs)
        ]


@dataclass(frozen=True)
class Job:
    """One prompt of a step and its completions."""

    step: StepInProgress
    index: int
    item: ScoreInput


@dataclass(frozen=True)
class CompletionAt:
    """Completion k of prompt `index`; `item` is the prompt with all its completions."""

    index: int
    k: int
    item: ScoreInput


class SourceThread:
    """Asks one reward source for the scores of everything in `queue`; None in the queue ends the thread."""

    def __init__(self, name: str, ask: Ask) -> None:
        self.name, self._ask = name, ask
        self.queue: SimpleQueue[Job | None] = SimpleQueue()
        self._checkpoint: str | None = None
        self._has_warned = False
        self.thread = threading.Thread(target=self._run, name=f"scores of {name}", daemon=True)
        self.thread.start()

    def _run(self) -> None:
        while jobs := self._take():
            for step in dict.fromkeys(job.step for job in jobs):  # the earlier step first
                completions = [
                    CompletionAt(job.index, k, job.item)
                    for job in jobs
                    if job.step is step
                    for k in range(len(job.item.completions))
                ]
                try:
                    self._score(step, completions)
                except Exception as error:  # collect raises it, in the controller's thread
                    step.end(error)
                except BaseException as error:  # a SystemExit that `collect` raised would end the run like a success
                    step.end(
                        RolloutError(
                            f"{self.name} ended with {type(error).__name__}: {error}. A reward source must return "
                            "scores or raise an Exception."
                        )
                    )

    def _take(self) -> list[Job]:
        """Wait for a job and return all that are queued; an empty list tells the thread to end."""
        first = self.queue.get()
        if first is not None:
            time.sleep(GATHER_S)
        jobs = [first, *(self.queue.get() for _ in range(self.queue.qsize()))]
        return [] if None in jobs else [job for job in jobs if job is not None]

    def _score(self, step: StepInProgress, completions: list[CompletionAt]) -> None:
        waiting = [completions]
        while waiting and not step.is_over:
            part = waiting.pop()
            try:
                answer = self._ask(inputs_of(part))
            except ScoringError as error:
                if len(part) > 1 and not isinstance(error, ScorerUnavailableError):
                    waiting += reversed(split(part))
                    continue
                answer = Answer([str(error)] * len(part), None)
            if answer.checkpoint is not None:
                self._note_checkpoint(step, answer.checkpoint)
            step.put(self.name, part, answer.scores)

    def _note_checkpoint(self, step: StepInProgress, checkpoint: str) -> None:
        is_change = self._checkpoint not in (None, checkpoint)
        if is_change and not self._has_warned:
            self._has_warned = True
            logger.warning(
                "%s now scores with %s, before with %s: rewards from two checkpoints cannot be compared",
                self.name,
                checkpoint,
                self._checkpoint,
            )
        self._checkpoint = checkpoint
        step.note_checkpoint(self.name, checkpoint, is_change=is_change)


def inputs_of(completions: Sequence[CompletionAt]) -> list[ScoreInput]:
    """Return one input for each prompt, with only those of its completions that are among `completions`."""
    groups = [list(group) for _, group in groupby(completions, key=lambda at: at.index)]
    return [
        group[0].item.model_copy(update={"completions": [at.item.completions[at.k] for at in group]})
        for group in groups
    ]


def split(completions: list[CompletionAt]) -> list[list[CompletionAt]]:
    """Split into at most NUM_PARTS consecutive parts of equal length, of which the last may be shorter."""
    part_length = math.ceil(len(completions) / NUM_PARTS)
    return [completions[start : start + part_length] for start in range(0, len(completions), part_length)]


def open_source(source: RewardSourceConfig, clients: contextlib.ExitStack) -> Ask:
    """Return the call to a reward source of the config; `clients` closes its HTTP client, if it has one."""
    if source.url is not None:
        return partial(ask_scorer, clients.enter_context(RewardClient(source.url)))
    assert source.function is not None
    return partial(ask_function, load_function(source))


def load_function(source: RewardSourceConfig) -> RewardFunction:
    """Import `package.module:function`. Raises ConfigError when it does not exist or cannot be called."""
    assert source.function is not None
    label = f"rloo.reward_sources: {source.name}.function = {source.function!r}"
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
            f"{label} is {function!r:.100}, which cannot be called. Name a function(prompt, completion) -> float."
        )
    return function  # type: ignore[no-any-return]


def ask_scorer(scorer: Scorer, inputs: Sequence[ScoreInput]) -> Answer:
    """Ask a served scorer; a score that is not finite counts as failed."""
    reply = scorer.score(inputs)
    return Answer([finite_or_reason(score) for scores in reply.scores for score in scores], reply.checkpoint)


def ask_function(function: RewardFunction, inputs: Sequence[ScoreInput]) -> Answer:
    """Call a reward function once for each completion."""
    return Answer(
        [call_function(function, item.prompt, completion) for item in inputs for completion in item.completions], None
    )


def call_function(function: RewardFunction, prompt: str | list[Message], completion: str) -> float | str:
    """Return the function's score, or a text that says why there is none.

    The function gets a copy of the messages, which it may change.
    """
    messages = (
        [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [dict(message) for message in prompt]
    )
    try:
        score = function(messages, completion)
        if isinstance(score, bool) or not isinstance(score, int | float):
            return f"it returned {score!r:.100}, not a float"
        return finite_or_reason(score)
    except Exception as error:  # a rule may raise anything; its completion is left out and counted
        return f"{type(error).__name__}: {error}"


def finite_or_reason(score: float) -> float | str:
    """Return the score if it is finite, else a text that says that it is not."""
    return float(score) if math.isfinite(score) else f"the score is {score}"


def too_many_failed(names: str, num_failed: int, *, of: int, max_fraction: float, reason: str) -> RolloutError:
    """Return the error for more than `max_fraction` failed scores among `of` completions."""
    num_allowed = math.floor(max_fraction * of + 1e-9)
    return RolloutError(
        f"{names} gave no score to {num_failed} of the step's {of} completions; "
        f"rloo.max_failed_score_fraction = {max_fraction} allows {num_allowed}. The last reason: {reason}. "
        "Repair the reward source and start the run again; it resumes."
    )
