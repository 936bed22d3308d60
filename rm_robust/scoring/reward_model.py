"""Score completions with a reward model in this process.

    from rm_robust import RewardModel

    reward_model = RewardModel.load("runs/tiny_cpu")
    reward_model.score("Name a colour.", ["Blue.", "Seven."])  # [1.3, -0.2]

torch, transformers and Ray are imported when a reward model is loaded, and not before.
"""

from collections.abc import Sequence
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


def _not_installed(error: ModuleNotFoundError) -> Exception:
    """Return the error that says what to install, or the error itself where the missing module is our own."""
    if error.name is None or error.name.split(".")[0] == "rm_robust":
        return error
    return NotInstalledError("RewardModel", error.name)
