"""Scores requests with a committed reward-model checkpoint."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from rm_robust.errors import DataError, ScoringError
from rm_robust.records import TokenGroup
from rm_robust.reward_model.scorer import RewardScorer
from rm_robust.scoring import ScoreInput, ScoreRequest, ScoreResult, TokenCounts
from serve.scorer import DialectRequest, Outcome, Part, Refusal, Scored, ServedModel, invalid_request, parts_of
from serve.settings import ScoringAppSettings

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Tokenised:
    """One request's token ids, and how many of its conversations were cut after their end of turn."""

    groups: list[TokenGroup]
    num_cut: int


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

    def score_requests(self, requests: Sequence[ScoreRequest | DialectRequest]) -> list[Outcome]:
        outcomes: dict[int, Outcome] = {}
        accepted: dict[int, Tokenised] = {}
        for index, request in enumerate(requests):
            tokenised = self._tokenise(request)
            if isinstance(tokenised, Refusal):
                outcomes[index] = tokenised
            else:
                accepted[index] = tokenised
        outcomes |= zip(accepted, self._score(list(accepted.values())), strict=True)
        return [outcomes[index] for index in range(len(requests))]

    def _tokenise(self, request: ScoreRequest | DialectRequest) -> Tokenised | Refusal:
        """422 for a conversation the template cannot take or would not have written, 413 for more tokens than the limit."""
        limit = self._scorer.max_length_tokens
        groups, num_cut = [], 0
        for part in parts_of(request):
            try:
                group, was_cut = self._token_group(part)
            except DataError as error:
                return invalid_request(part.prompt_field, error)
            lengths = [len(group.prompt_ids) + len(ids) for ids in group.completion_ids]
            if max(lengths) > limit:
                where = part.completion_field.format(lengths.index(max(lengths)))
                return Refusal(413, "too_long", f"{where} has {max(lengths)} tokens with its prompt, the limit max_length_tokens is {limit}.")
            groups.append(group)
            num_cut += was_cut
        return Tokenised(groups, num_cut)

    def _token_group(self, part: Part) -> tuple[TokenGroup, bool]:
        """The part's token ids, and whether something after its end of turn was left off. Raises DataError."""
        chat, content = self._scorer.chat, part.content
        if isinstance(content, ScoreInput):
            return TokenGroup(chat.prompt_ids(content.prompt), [chat.completion_ids(completion) for completion in content.completions]), False
        whole = chat.rendered_text(content) if isinstance(content, str) else chat.rendered_ids(content)
        return TokenGroup(whole.prompt_ids, [whole.completion_ids]), whole.was_cut

    def _score(self, requests: list[Tokenised]) -> list[Outcome]:
        """All requests in one pass; when one of them makes it fail, each alone, so that only that one is refused."""
        try:
            scores = self._scorer.score_groups([group for request in requests for group in request.groups])
        except ScoringError as error:
            if len(requests) > 1:
                return [outcome for request in requests for outcome in self._score([request])]
            logger.error("a request was refused: %s", error)
            return [Refusal(500, "scoring_failed", str(error))]
        outcomes: list[Outcome] = []
        start = 0
        for request in requests:
            end = start + len(request.groups)
            results = [ScoreResult(scores=s, token_counts=token_counts(g)) for s, g in zip(scores[start:end], request.groups, strict=True)]
            outcomes.append(Scored(self.describe(), results, request.num_cut))
            start = end
        return outcomes


def token_counts(group: TokenGroup) -> TokenCounts:
    return TokenCounts(prompt=len(group.prompt_ids), completions=[len(ids) for ids in group.completion_ids])
