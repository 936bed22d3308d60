"""A committed checkpoint in this process, as the Scorer that an endpoint is too: same cases, same replies."""

import socket
from collections.abc import Sequence
from pathlib import Path

import torch

from rm_robust.errors import ConfigError, DataError, RefusedInputError, ScoringError
from rm_robust.records import TokenGroup
from rm_robust.reward_model.scorer import RewardScorer
from rm_robust.score_contract import ScoreInput, ScoreReply, ScoreResult

ON_A_GPU = "Start it on a machine with a GPU (a Ray job: `ray job submit --entrypoint-num-gpus=1 …`)"


def require_device(device: str, what: str, *, fix: str) -> None:
    """Raise ConfigError where this process cannot use `device`; `what` names the setting."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        host = socket.gethostname()
        reason = f"{host} has no CUDA" if device.startswith("cuda") and not torch.cuda.is_available() else str(error).strip().splitlines()[0]
        raise ConfigError(f"{what} cannot be used: this process, on {host}, does the scoring, and {reason}. {fix}") from error


class CheckpointSource:
    """A Scorer in float32, so that rounding makes no ties."""

    def __init__(self, checkpoint_dir: Path, *, device: str, max_length_tokens: int | None, max_tokens_per_batch: int) -> None:
        """Raises CheckpointError for what is no reward model of ours."""
        self._scorer = RewardScorer.load(checkpoint_dir, device=device, dtype="float32", max_length_tokens=max_length_tokens)
        self._max_tokens_per_batch = max_tokens_per_batch

    def score(self, inputs: Sequence[ScoreInput]) -> ScoreReply:
        """Raises RefusedInputError for an input that is too long, no valid text, or gets a score that is not finite."""
        chat = self._scorer.chat
        try:
            groups = [TokenGroup(chat.prompt_ids(item.prompt), [chat.completion_ids(text) for text in item.completions]) for item in inputs]
            scores = self._scorer.score_groups(groups, max_tokens_per_batch=self._max_tokens_per_batch)
        except (DataError, ScoringError) as error:
            raise RefusedInputError(str(error)) from error
        return ScoreReply(
            model=self._scorer.model_name,
            checkpoint=self._scorer.checkpoint_id,
            template=chat.template_sha256,
            results=[ScoreResult(scores=own) for own in scores],
        )
