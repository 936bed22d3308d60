"""Turn requests into token ids for a committed reward-model checkpoint.

rm_robust/data/chat.py makes the token ids, as it does in training.
"""

from pathlib import Path

from rm_robust.data.chat import ChatFormat
from rm_robust.data.records import TokenGroup
from rm_robust.errors import CheckpointError, DataError
from rm_robust.models.checkpoint import read_json, read_manifest
from rm_robust.scoring.contract import ScoreInput, TokenCounts
from serve.work import Part, Prepared, Refusal, ScoringRequest, ServedModel, WorkItem, invalid_request, parts_of

MIN_SHARE_OF_COMPLETIONS = 4
"""Tokens of completions per token of their prompt that one forward has at least, if the completions have that many.

Computing a long prompt again for the next forward then adds a quarter at most.
"""


class CheckpointPreparer:
    """A Preparer that uses the chat format saved beside the weights."""

    def __init__(self, served: ServedModel) -> None:
        """Load the chat format. Raises CheckpointError when it is no longer the one that the replica loaded."""
        assert served.checkpoint_dir is not None
        assert served.max_length_tokens is not None
        folder = Path(served.checkpoint_dir)
        if read_manifest(folder).content_sha256 != served.checkpoint:
            raise CheckpointError(
                f"{folder} is no longer the checkpoint {served.checkpoint} that its replica loaded. Deploy the new one."
            )
        self._chat = ChatFormat.load(folder)
        if self._chat.template_sha256 != served.template:
            raise CheckpointError(
                f"{folder} has the template {self._chat.template_sha256}, its replica loaded {served.template}."
            )
        self._max_length_tokens, self._max_batch_tokens = served.max_length_tokens, served.max_batch_tokens
        config = read_json(folder / "config.json")
        self._vocab_size = int(config.get("text_config", config)["vocab_size"])
        """The number of tokens that the model knows; its tokenizer may know more."""

    def prepare(self, request: ScoringRequest) -> Prepared | Refusal:
        items: list[WorkItem] = []
        counts: list[TokenCounts | None] = []
        num_cut = 0
        for index, part in enumerate(parts_of(request)):
            try:
                group, was_cut = self._token_group(part)
            except DataError as error:
                return invalid_request(part.prompt_field, error)
            num_prompt = len(group.prompt_ids)
            lengths = [len(ids) for ids in group.completion_ids]
            if num_prompt + max(lengths) > self._max_length_tokens:
                field = part.completion_field.format(lengths.index(max(lengths)))
                message = (
                    f"{field} has {num_prompt + max(lengths)} tokens with its prompt, "
                    f"the limit max_length_tokens is {self._max_length_tokens}."
                )
                return Refusal(413, "too_long", message)
            key = hash(tuple(group.prompt_ids))
            items += [
                WorkItem(index, subgroup, key, num_prompt, sum(map(len, subgroup.completion_ids)))
                for subgroup in self._split(group)
            ]
            counts.append(TokenCounts(prompt=num_prompt, completions=lengths))
            num_cut += was_cut
        return Prepared(items, counts, num_cut)

    def _split(self, group: TokenGroup) -> list[TokenGroup]:
        """Return the group in parts of about one batch each: a thousand completions must not be one forward."""
        num_prompt = len(group.prompt_ids)
        room = max(self._max_batch_tokens - num_prompt, MIN_SHARE_OF_COMPLETIONS * num_prompt)
        parts: list[TokenGroup] = []
        num_tokens = 0
        for ids in group.completion_ids:
            num_tokens += len(ids)
            if not parts or num_tokens > room:
                parts.append(TokenGroup(group.prompt_ids, []))
                num_tokens = len(ids)
            parts[-1].completion_ids.append(ids)
        return parts

    def _token_group(self, part: Part) -> tuple[TokenGroup, bool]:
        """Return the part's token ids, and whether text after its end of turn was cut off. Raises DataError."""
        chat, content, was_cut = self._chat, part.content, False
        if isinstance(content, ScoreInput):
            group = chat.token_group(content.prompt, content.completions)
        else:
            rendered = chat.rendered_text(content) if isinstance(content, str) else chat.rendered_ids(content)
            group, was_cut = TokenGroup(rendered.prompt_ids, [rendered.completion_ids]), rendered.was_cut
        largest = max(max(ids) for ids in (group.prompt_ids, *group.completion_ids))
        if largest >= self._vocab_size:  # otherwise the model would fail, and the whole batch with it
            raise DataError(
                f"The model has no token {largest}, {chat.tokenizer.convert_ids_to_tokens(largest)!r}; "
                f"it knows {self._vocab_size}."
            )
        return group, was_cut
