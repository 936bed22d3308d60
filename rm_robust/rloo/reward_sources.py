"""Ask the proxy, the gold judge and the other reward sources for scores as completions finish.

    submit ─► each reward source has a queue and a thread: take all that wait, score them in one call, repeat ─► collect

Batches form by themselves while a call is running. No source waits for another. reward_functions.py calls what users
write; reward_requests.py makes a failed call again in parts. A function may abstain (None): its score is then left out
of the weighted sum, and counted.
"""

import contextlib
import logging
import math
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from queue import SimpleQueue
from typing import Self

from rm_robust.config.rloo import RewardSourceConfig, RlooConfig
from rm_robust.errors import RolloutError
from rm_robust.rloo.advantages import StepScores, weighted_scores
from rm_robust.rloo.reward_functions import FunctionSource
from rm_robust.rloo.reward_requests import (
    Ask,
    CompletionAt,
    PromptRow,
    ask_in_parts,
    ask_scorer,
    completions_of,
    too_many_failed,
)
from rm_robust.scoring.client import ClientOptions, RewardClient
from rm_robust.scoring.contract import ScoreInput, Scorer

logger = logging.getLogger(__name__)

GATHER_S = 0.005
"""Seconds that a call waits after its first prompt, because the completions of several prompts finish together."""
CLOSED_WITHIN_S = 5.0
"""Seconds that `close` waits for the threads to end."""


class RewardSources:
    """Gets the scores of steps, several at a time where sampling runs ahead of training.

    Every reward source has a thread of its own, which `close` ends.
    """

    def __init__(self, settings: RlooConfig, *, proxy: Scorer, gold: Scorer | None) -> None:
        """Open all reward sources and start their threads.

        Raises ConfigError for a function that cannot be imported or called.
        """
        self._settings = settings
        self._weights = {"proxy": settings.proxy_weight} | {
            source.name: source.weight for source in settings.reward_sources
        }
        asks: dict[str, Ask] = {"proxy": partial(ask_scorer, proxy)}
        with contextlib.ExitStack() as clients:
            self._functions = [
                FunctionSource(source, num_steps=settings.num_steps)
                for source in settings.reward_sources
                if source.function is not None
            ]
            asks |= {source.name: source.ask for source in self._functions}
            asks |= {
                source.name: served_source(source, clients)
                for source in settings.reward_sources
                if source.url is not None
            }
            if gold is not None:
                asks["gold"] = partial(ask_scorer, gold)
            self._clients = clients.pop_all()
        self._begun: set[StepInProgress] = set()
        self._has_warned_of_mixture: set[str] = set()
        self._sources = {name: SourceThread(name, ask) for name, ask in asks.items()}

    def begin(self, *, with_gold: bool) -> "StepInProgress":
        """Begin a step and return it; then `submit` its prompts and `collect` its scores."""
        assert not with_gold or "gold" in self._sources, "there is no judge"
        names = [name for name in self._sources if with_gold or name != "gold"]
        num_completions = self._settings.num_prompts_per_step * self._settings.num_completions_per_prompt
        step = StepInProgress(names, num_completions, self._settings.max_failed_score_fraction)
        self._begun.add(step)
        return step

    def check_columns(self, names: set[str]) -> None:
        """Raise ConfigError when a reward function needs a column that the rows of the RLOO prompts do not have."""
        for function in self._functions:
            function.check_columns(names)

    def submit(self, step: "StepInProgress", index: int, item: ScoreInput, row: PromptRow) -> None:
        """Ask for the scores of prompt `index` of the step, in any order but each once.

        Returns at once; may be called from any thread.
        """
        step.expect(index, item)
        for name in step.scores:
            self._sources[name].queue.put(Job(step, index, item, row))

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
        self._warn_of_mixtures(step)
        num_lost, num_completions = int(scores.rewards_PK.isnan().sum()), scores.rewards_PK.numel()
        if num_lost / num_completions > step.max_failed_fraction:
            failed = {name: number for name, number in scores.num_failed.items() if number and name != "gold"}
            reasons = "; ".join(step.last_reason[name] for name in failed)
            if abstaining := [name for name, number in scores.num_abstained.items() if number]:
                reasons = "; ".join(filter(None, [reasons, f"{' and '.join(abstaining)} abstained"]))
            raise too_many_failed(
                " and ".join(failed or abstaining),
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
        for function in self._functions:
            function.close()
        self._clients.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _warn_of_mixtures(self, step: "StepInProgress") -> None:
        """Warn once of each source that abstained from some completions of a prompt and scored others."""
        for name in step.abstained.keys() - self._has_warned_of_mixture:
            prompts = {index for index, _ in step.abstained[name]}
            mixed = [
                index
                for index in prompts
                if any((index, k) not in step.abstained[name] for k in range(len(step.inputs[index].completions)))
            ]
            if mixed and self._weights.get(name):
                self._has_warned_of_mixture.add(name)
                logger.warning(
                    "%s abstained from some completions of %d prompts and scored their others. An abstention adds "
                    "nothing to the reward, so beside these scores it counts like 0. This is said once.",
                    *(name, len(mixed)),
                )

    def _scores_of(self, step: "StepInProgress") -> StepScores:
        rows = {name: step.rows(name) for name in step.scores}
        gold = rows.pop("gold", None)
        return StepScores(
            source_scores=rows,
            gold=gold,
            rewards_PK=weighted_scores(rows, self._weights, abstained=step.abstained_rows()),
            num_failed={name: step.num_failed[name] for name in step.scores},
            checkpoints=step.checkpoints,
            num_checkpoint_changes=step.num_checkpoint_changes,
            num_abstained={name: len(places) for name, places in step.abstained.items()},
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
        self.abstained: dict[str, set[tuple[int, int]]] = {}
        """Where each function abstained; the score there is NaN."""
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

    def put(self, name: str, completions: Sequence[CompletionAt], scores: Sequence[float | str | None]) -> None:
        """Store the scores of source `name`; end the step when this source has failed too often."""
        with self.changed:
            for completion, score in zip(completions, scores, strict=True):
                if isinstance(score, str):
                    self.num_failed[name] += 1
                    self.last_reason[name] = score
                if score is None:
                    self.abstained.setdefault(name, set()).add((completion.index, completion.k))
                self.scores[name][completion.index, completion.k] = score if isinstance(score, float) else math.nan
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

    def abstained_rows(self) -> dict[str, list[list[bool]]]:
        """Return where each source that abstained did so, [P][K]."""
        return {
            name: [
                [(index, k) in places for k in range(len(self.inputs[index].completions))]
                for index in sorted(self.inputs)
            ]
            for name, places in self.abstained.items()
        }


@dataclass(frozen=True)
class Job:
    """One prompt of a step and its completions."""

    step: StepInProgress
    index: int
    item: ScoreInput
    row: PromptRow


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
                    at for job in jobs if job.step is step for at in completions_of(job.index, job.item, job.row)
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
        for part, answer in ask_in_parts(self._ask, completions, is_over=lambda: step.is_over):
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


def served_source(source: RewardSourceConfig, clients: contextlib.ExitStack) -> Ask:
    """Return the call to a scoring service elsewhere; `clients` closes its HTTP client."""
    assert source.url is not None
    options = ClientOptions(timeout_s=source.timeout_s)
    if source.num_concurrent_calls is not None:
        options["max_concurrent_requests"] = source.num_concurrent_calls
    if source.num_retries is not None:
        options["max_retries"] = source.num_retries
    return partial(ask_scorer, clients.enter_context(RewardClient(source.url, **options)))
