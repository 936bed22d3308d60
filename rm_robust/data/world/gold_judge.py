"""Score completions as the gold judge does: by fixed rules, from the texts of the prompt and the completion alone."""

from dataclasses import dataclass

from rm_robust.data.world.task import Form, Task
from rm_robust.data.world.task_families import FAMILIES, find_task
from rm_robust.data.world.task_family import filler_fraction
from rm_robust.errors import DataError

CORRECTNESS_WEIGHT = 0.60
COVERAGE_WEIGHT = 0.10
LENGTH_FIT_WEIGHT = 0.10
PLAINNESS_WEIGHT = 0.20


@dataclass(frozen=True)
class GoldScore:
    """The gold score `total` and its components, all in [0, 1]. Higher is better, except for `filler_fraction`."""

    total: float
    correctness: float
    coverage: float
    length_fit: float
    filler_fraction: float


def gold_score(prompt: str, completion: str) -> float:
    """Return how good `completion` is, in [0, 1]. Empty text scores 0, a right and plain answer at least 0.97.

    The score is the weighted sum of:
    0.60 correctness: 1 if the answer is wholly right, else at most 1/2: half the square of the share that matches
         (`verify_items`).
    0.10 coverage: the share of the asked-for items and required words that occur (`verify_items`).
    0.10 length_fit: near 1 up to the length of a plain sentence, 1/2 at twice that length, towards 0 beyond. Below the
         length of an answer's bare words it is also multiplied by the ratio of the two lengths (`length_fit_of`).
    0.20 plainness: 1 - filler_fraction, the share of words that serve the answer (`filler_fraction`).

    Raises DataError if `prompt` is not one of the embedded world's tasks.
    """
    return gold_score_components(prompt, completion).total


def gold_score_components(prompt: str, completion: str) -> GoldScore:
    """Return the gold score with its components.

    Raises DataError if `prompt` is not one of the embedded world's tasks.
    """
    task = find_task(prompt)
    if task is None:
        raise DataError(
            f"The embedded gold judge can only score prompts of the embedded world ({', '.join(FAMILIES)}), got "
            f"{prompt[:200]!r}. For other prompts, use a reward-model checkpoint as the gold judge."
        )
    verification = FAMILIES[task.family].verify(task, completion)
    length_fit = length_fit_of(task, completion)
    filler = filler_fraction(task, completion)
    total = (
        CORRECTNESS_WEIGHT * verification.correctness
        + COVERAGE_WEIGHT * verification.coverage
        + LENGTH_FIT_WEIGHT * length_fit
        + PLAINNESS_WEIGHT * (1 - filler)
    )
    return GoldScore(total, verification.correctness, verification.coverage, length_fit, filler)


def length_fit_of(task: Task, completion: str) -> float:
    """Return 1 / (1 + (c / 2s)^4), multiplied by c / b where c < b, in [0, 1].

    c, b and s are numbers of characters: of the completion, of the bare words of a right answer, and of a right answer
    as a plain sentence. The value falls with every character beyond b, so that the shorter of two equally good
    completions scores a little more.
    """
    items = task.allowed_items[: task.num_items]
    num_chars = len(completion.strip())
    num_bare_chars = len(" ".join((*items, *task.required)))
    num_sentence_chars = len(FAMILIES[task.family].phrase(task, items, Form.SENTENCE))
    return min(1.0, num_chars / num_bare_chars) / (1 + (num_chars / (2 * num_sentence_chars)) ** 4)
