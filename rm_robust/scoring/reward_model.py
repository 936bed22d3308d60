"""Score completions with a reward model in this process.

    from rm_robust import RewardModel

    reward_model = RewardModel.load("runs/tiny_cpu")
    prompt = "Today Mia bought a brown pear. Please tell me only the thing."
    reward_model.score(prompt, ["The answer is pear.", "It is brown."])  # the better answer has the higher score

torch, transformers and Ray are imported when a reward model is loaded, and not before.
"""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Self

from rm_robust.data.records import Message
from rm_robust.errors import ConfigError, DataError, NotInstalledError
from rm_robust.scoring.contract import ScoreInput

if TYPE_CHECKING:
    from rm_robust.scoring.checkpoint_scorer import CheckpointScorer

MOST_TOKENS_PER_BATCH = 8192
MOST_QUOTED = 100
"""The largest number of characters of a caller's value that an error message quotes."""


class RewardModel:
    """A reward model in this process. It computes in float32, and gives the scores that a service would give."""

    def __init__(self, scorer: "CheckpointScorer") -> None:
        """Keep the loaded scorer. `RewardModel.load` makes one."""
        self._scorer = scorer

    @classmethod
    def load(cls, path: str | Path, *, device: str = "cpu") -> Self:
        """Load the reward model of a run directory, or a checkpoint: a committed or an adopted one.

        `path` may be a URI (s3://…). `device` is "cpu" or "cuda". Raises CheckpointError when there is no reward model
        at `path` or it was altered, ConfigError when the device or a library is missing, and StorageError when an
        object store cannot be reached.
        """
        if not isinstance(path, str | Path):
            raise ConfigError(f"RewardModel.load needs a path or a URI, got {path!r:.{MOST_QUOTED}}.")
        try:
            from rm_robust.scoring import checkpoint_scorer
            from rm_robust.scoring.find_checkpoint import find_reward_model
        except ModuleNotFoundError as error:
            raise _not_installed(error) from error
        checkpoint_scorer.require_device(device, f"device={device!r}", fix='Use device="cpu", or a machine with a GPU.')
        with _without_progress_bars():
            scorer = checkpoint_scorer.CheckpointScorer(
                find_reward_model(str(path)),
                device=device,
                max_length_tokens=None,
                max_tokens_per_batch=MOST_TOKENS_PER_BATCH,
            )
        return cls(scorer)

    def score(self, prompt: str | list[Message], completions: Sequence[str]) -> list[float]:
        """Return the raw score of each completion, in their order.

        `prompt` is one user turn as text, or messages ({"role": …, "content": …}), of which the last is the user's.
        Raises DataError for values of another kind and without completions, and RefusedInputError when a text is too
        long or invalid, or its score is not finite.
        """
        from rm_robust.data.chat import as_messages

        if isinstance(completions, str) or not isinstance(completions, Sequence):
            raise DataError(f"completions must be a list of texts, got {completions!r:.{MOST_QUOTED}}.")
        if not completions:
            raise DataError("completions is empty. Give at least one text to score.")
        for index, text in enumerate(completions):
            if not isinstance(text, str):
                raise DataError(f"completions[{index}] must be a text, got {text!r:.{MOST_QUOTED}}.")
        item = ScoreInput(prompt=as_messages(prompt), completions=list(completions))
        (scores,) = self._scorer.score([item]).scores
        return scores


@contextlib.contextmanager
def _without_progress_bars() -> Iterator[None]:
    """Turn off the bars of transformers in the body; what the caller's program has chosen holds again afterwards."""
    from transformers.utils import logging as transformers_logging

    were_shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if were_shown:
            transformers_logging.enable_progress_bar()


def _not_installed(error: ModuleNotFoundError) -> Exception:
    """Return the error that says what to install, or the error itself where the missing module is our own."""
    if error.name is None or error.name.split(".")[0] == "rm_robust":
        return error
    return NotInstalledError("RewardModel", error.name)
