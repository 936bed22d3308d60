"""A committed checkpoint in this process, as the Scorer that an endpoint is too: same cases, same replies."""

from collections.abc import Sequence
from pathlib import Path

from rm_robust.errors import DataError, RefusedInputError, ScoringError
from rm_robust.records import TokenGroup
from rm_robust.reward_model.scorer import RewardScorer
from rm_robust.score_contract import ScoreInput, ScoreReply, ScoreResult


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
