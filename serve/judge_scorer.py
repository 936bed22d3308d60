"""Scores requests with the embedded world's gold judge."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

from rm_robust import embedded_world
from rm_robust.embedded_world.gold_judge import gold_score
from rm_robust.errors import DataError, RmRobustError
from rm_robust.records import Message
from rm_robust.scoring import ScoreInput, ScoreRequest, ScoreResult
from serve.scorer import DialectRequest, Outcome, Scored, ServedModel, invalid_request, parts_of
from serve.settings import ScoringAppSettings


class EmbeddedJudgeScorer:
    """A Scorer on `gold_score`: single-turn prompts of the embedded world only; any other prompt is refused with 422."""

    def __init__(self, settings: ScoringAppSettings) -> None:
        checkpoint_id = source_sha256(Path(embedded_world.__path__[0]))
        self._served = ServedModel(settings.model_name, checkpoint_id, template=None, max_length_tokens=None)

    def describe(self) -> ServedModel:
        return self._served

    def score_requests(self, requests: Sequence[ScoreRequest | DialectRequest]) -> list[Outcome]:
        return [self._score(request) for request in requests]

    def _score(self, request: ScoreRequest | DialectRequest) -> Outcome:
        results = []
        for part in parts_of(request):
            item = part.content
            if not isinstance(item, ScoreInput):
                return invalid_request(part.prompt_field, "The embedded judge has no chat template, so it takes no rendered conversation; use messages.")
            try:
                prompt = single_turn_text(item.prompt)
                results.append(ScoreResult(scores=[gold_score(prompt, completion) for completion in item.completions]))
            except RmRobustError as error:
                return invalid_request(part.prompt_field, error)
        return Scored(self._served, results)


def single_turn_text(prompt: str | list[Message]) -> str:
    """The one user message's text. Raises DataError for anything else: the judge would have to ignore the other turns."""
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1 and prompt[0].get("role") == "user" and "content" in prompt[0]:
        return prompt[0]["content"]
    raise DataError(f"The embedded judge knows single-turn prompts only, got roles {[m.get('role') for m in prompt]}; send one user message.")


def source_sha256(package_dir: Path) -> str:
    """The judge's identity in replies: it has no weights, so the code of its world stands for them."""
    digest = hashlib.sha256()
    for path in sorted(package_dir.glob("*.py")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return "sha256:" + digest.hexdigest()
