"""Scores requests with a committed reward-model checkpoint."""

import logging
from collections.abc import Sequence
from pathlib import Path

import torch

from rm_robust.errors import DataError, ScoringError
from rm_robust.records import TokenGroup
from rm_robust.reward_model.scorer import RewardScorer
from rm_robust.scoring import ScoreRequest, ScoreResult, TokenCounts
from serve.scorer import Outcome, Refusal, Scored, ServedModel, invalid_request
from serve.settings import ScoringAppSettings

logger = logging.getLogger(__name__)


class CheckpointScorer:
    """A Scorer on a RewardScorer; chat.py makes the token ids, as it does in training."""

    def __init__(self, settings: ScoringAppSettings, checkpoint_dir: Path) -> None:
        """Raises CheckpointError for a checkpoint that is missing, altered or not a reward model."""
        torch.set_num_threads(settings.num_threads)
        self._scorer = RewardScorer.load(
            checkpoint_dir,
            device=settings.device,
            dtype=settings.dtype,
            max_length_tokens=settings.max_length_tokens,
            model_name=settings.model_name,
        )

    def describe(self) -> ServedModel:
        scorer = self._scorer
        return ServedModel(scorer.model_name, scorer.checkpoint_id, scorer.chat.template_sha256, scorer.max_length_tokens)

    def score_requests(self, requests: Sequence[ScoreRequest]) -> list[Outcome]:
        outcomes: dict[int, Outcome] = {}
        accepted: dict[int, list[TokenGroup]] = {}
        for index, request in enumerate(requests):
            tokenised = self._tokenise(request)
            if isinstance(tokenised, Refusal):
                outcomes[index] = tokenised
            else:
                accepted[index] = tokenised
        outcomes |= zip(accepted, self._score(list(accepted.values())), strict=True)
        return [outcomes[index] for index in range(len(requests))]

    def _tokenise(self, request: ScoreRequest) -> list[TokenGroup] | Refusal:
        """One group per input; 422 for a conversation the template cannot take, 413 for more tokens than the limit."""
        chat, limit = self._scorer.chat, self._scorer.max_length_tokens
        groups = []
        for index, item in enumerate(request.inputs):
            try:
                prompt_ids = chat.prompt_ids(item.prompt)
            except DataError as error:
                return invalid_request(f"inputs[{index}].prompt", error)
            completion_ids = [chat.completion_ids(completion) for completion in item.completions]
            lengths = [len(prompt_ids) + len(ids) for ids in completion_ids]
            if max(lengths) > limit:
                where = f"inputs[{index}].completions[{lengths.index(max(lengths))}]"
                return Refusal(413, "too_long", f"{where} has {max(lengths)} tokens with its prompt, the limit max_length_tokens is {limit}.")
            groups.append(TokenGroup(prompt_ids, completion_ids))
        return groups

    def _score(self, requests: list[list[TokenGroup]]) -> list[Outcome]:
        """All requests in one pass; when one of them makes it fail, each alone, so that only that one is refused."""
        try:
            scores = self._scorer.score_groups([group for groups in requests for group in groups])
        except ScoringError as error:
            if len(requests) > 1:
                return [outcome for groups in requests for outcome in self._score([groups])]
            logger.error("a request was refused: %s", error)
            return [Refusal(500, "scoring_failed", str(error))]
        outcomes: list[Outcome] = []
        start = 0
        for groups in requests:
            end = start + len(groups)
            results = [ScoreResult(scores=s, token_counts=token_counts(g)) for s, g in zip(scores[start:end], groups, strict=True)]
            outcomes.append(Scored(self.describe(), results))
            start = end
        return outcomes


def token_counts(group: TokenGroup) -> TokenCounts:
    return TokenCounts(prompt=len(group.prompt_ids), completions=[len(ids) for ids in group.completion_ids])
