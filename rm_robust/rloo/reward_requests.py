"""What a reward source is asked about and what it answers; and how a call that fails is made again in parts."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

from rm_robust.errors import RolloutError, ScorerUnavailableError, ScoringError
from rm_robust.scoring.contract import ScoreInput, Scorer

NUM_PARTS = 4
"""Number of parts that a failed call is split into.

With two parts, as many calls would find one bad completion, but the good ones beside it would be scored more often.
"""


@dataclass(frozen=True)
class PromptRow:
    """What a reward function can get beside the texts of a prompt and its completions."""

    prompt_id: str = ""
    step: int = 0
    """The number of updates that the policy has had before the step (TRL's global_step)."""
    columns: dict[str, Any] = field(default_factory=dict)
    """The columns of the prompt's row as they were given."""
    completion_ids: list[list[int]] = field(default_factory=list)
    """The sampled token ids of each completion."""


@dataclass(frozen=True)
class CompletionAt:
    """Completion k of prompt `index`; `item` is the prompt with all its completions."""

    index: int
    k: int
    item: ScoreInput
    row: PromptRow


@dataclass(frozen=True)
class Answer:
    """The answer of a reward source for each completion, in order.

    It is a score, a text that says why there is none, or None where a function abstains. `checkpoint` is that of a
    served source; functions have none.
    """

    scores: list[float | str | None]
    checkpoint: str | None


Ask = Callable[[Sequence[CompletionAt]], Answer]
"""A call to a reward source; it raises ScoringError when there is no answer at all."""


def completions_of(index: int, item: ScoreInput, row: PromptRow) -> list[CompletionAt]:
    """Return every completion of one prompt."""
    return [CompletionAt(index, k, item, row) for k in range(len(item.completions))]


def ask_in_parts(
    ask: Ask, completions: list[CompletionAt], *, is_over: Callable[[], bool] = lambda: False
) -> Iterator[tuple[list[CompletionAt], Answer]]:
    """Yield parts of the completions with their answers, until every completion has one or `is_over` says so.

    A call that fails is made again in parts, so that only completions that fail alone have no score. Nothing is asked
    again of a source that did not answer in spite of all retries.
    """
    waiting = [completions]
    while waiting and not is_over():
        part = waiting.pop()
        try:
            answer = ask(part)
        except ScoringError as error:
            if len(part) > 1 and not isinstance(error, ScorerUnavailableError):
                waiting += reversed(split(part))
                continue
            answer = Answer([str(error)] * len(part), None)
        yield part, answer


def ask_scorer(scorer: Scorer, completions: Sequence[CompletionAt]) -> Answer:
    """Ask a served scorer; a score that is not finite counts as failed."""
    reply = scorer.score(inputs_of(completions))
    return Answer([finite_or_reason(score) for scores in reply.scores for score in scores], reply.checkpoint)


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
