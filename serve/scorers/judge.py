"""Both halves of the embedded world's gold judge.

The front refuses what the judge cannot judge, and the replicas score the rest.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import rm_robust.data.world as embedded_world
from rm_robust.data.records import Message, TokenGroup
from rm_robust.data.world.gold_judge import gold_score
from rm_robust.errors import DataError, RmRobustError
from rm_robust.scoring.contract import ScoreInput, TokenCounts
from serve.settings import ModelSettings
from serve.work import Prepared, Refusal, ScoringRequest, ServedModel, WorkItem, invalid_request, parts_of

CHARACTERS_PER_TOKEN = 4
"""Characters that count as one token. The judge makes no tokens, but batches and queues are measured in them."""


class JudgePreparer:
    """A Preparer that takes single-turn prompts of the embedded world, and refuses any other prompt with 422."""

    def prepare(self, request: ScoringRequest) -> Prepared | Refusal:
        items = []
        for index, part in enumerate(parts_of(request)):
            item = part.content
            if not isinstance(item, ScoreInput):
                return invalid_request(
                    part.prompt_field,
                    "The embedded judge has no chat template, so it takes no rendered conversation; use messages.",
                )
            try:
                prompt = single_turn_text(item.prompt)
                gold_score(prompt, "")
            except RmRobustError as error:
                return invalid_request(part.prompt_field, error)
            num_tokens = [1 + len(text) // CHARACTERS_PER_TOKEN for text in (prompt, *item.completions)]
            items.append(
                WorkItem(
                    index,
                    ScoreInput(prompt=prompt, completions=item.completions),
                    hash(prompt),
                    num_tokens[0],
                    sum(num_tokens[1:]),
                )
            )
        counts: list[TokenCounts | None] = [None] * len(items)
        return Prepared(items, counts)


class JudgeScorer:
    """A BatchScorer that scores with `gold_score`."""

    def __init__(self, settings: ModelSettings, generation: int) -> None:
        checkpoint_id = source_sha256(Path(embedded_world.__path__[0]))
        self.served = ServedModel(
            settings.model_name, checkpoint_id, template=None, max_length_tokens=None, generation=generation
        )

    def score(self, contents: Sequence[TokenGroup | ScoreInput]) -> list[list[float] | str]:
        results: list[list[float] | str] = []
        for item in contents:
            assert isinstance(item, ScoreInput), "the judge scores text"
            assert isinstance(item.prompt, str), "JudgePreparer makes the prompt one text"
            results.append([gold_score(item.prompt, completion) for completion in item.completions])
        return results


def single_turn_text(prompt: str | list[Message]) -> str:
    """Return the text of the prompt's only user message.

    Raises DataError for any other prompt, because the judge would have to ignore the other turns.
    """
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1 and prompt[0].get("role") == "user" and "content" in prompt[0]:
        return prompt[0]["content"]
    raise DataError(
        "The embedded judge knows single-turn prompts only, "
        f"got roles {[message.get('role') for message in prompt]}; send one user message."
    )


def source_sha256(package_dir: Path) -> str:
    """Return the judge's identity in replies. It has no weights, so the code of its world stands for them."""
    digest = hashlib.sha256()
    for path in sorted(package_dir.glob("*.py")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return "sha256:" + digest.hexdigest()
