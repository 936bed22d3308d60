"""Requests to token ids, for a committed reward-model checkpoint; chat.py makes them, as it does in training."""

import json
from pathlib import Path

from rm_robust.chat import ChatFormat
from rm_robust.errors import CheckpointError, DataError
from rm_robust.records import TokenGroup
from rm_robust.scoring import ScoreInput, TokenCounts
from serve.scorer import Part, Prepared, Refusal, Request, ServedModel, WorkItem, invalid_request, parts_of


class CheckpointPreparer:
    """A Preparer on the chat format beside the weights."""

    def __init__(self, served: ServedModel) -> None:
        """Raises CheckpointError when the tokenizer is no longer the one that the replica loaded."""
        assert served.checkpoint_dir is not None
        assert served.max_length_tokens is not None
        self._chat = ChatFormat.load(Path(served.checkpoint_dir))
        if self._chat.template_sha256 != served.template:
            raise CheckpointError(f"{served.checkpoint_dir} now has the template {self._chat.template_sha256}, its replica loaded {served.template}.")
        self._max_length_tokens = served.max_length_tokens
        self._vocab_size = int(json.loads((Path(served.checkpoint_dir) / "config.json").read_text())["vocab_size"])
        """Of the model; its tokenizer may know more tokens."""

    def prepare(self, request: Request) -> Prepared | Refusal:
        items: list[WorkItem] = []
        counts: list[TokenCounts | None] = []
        num_cut = 0
        for part in parts_of(request):
            try:
                group, was_cut = self._token_group(part)
            except DataError as error:
                return invalid_request(part.prompt_field, error)
            num_prompt = len(group.prompt_ids)
            lengths = [len(ids) for ids in group.completion_ids]
            if num_prompt + max(lengths) > self._max_length_tokens:
                where = part.completion_field.format(lengths.index(max(lengths)))
                message = f"{where} has {num_prompt + max(lengths)} tokens with its prompt, the limit max_length_tokens is {self._max_length_tokens}."
                return Refusal(413, "too_long", message)
            items.append(WorkItem(group, hash(tuple(group.prompt_ids)), num_prompt, sum(lengths)))
            counts.append(TokenCounts(prompt=num_prompt, completions=lengths))
            num_cut += was_cut
        return Prepared(items, counts, num_cut)

    def _token_group(self, part: Part) -> tuple[TokenGroup, bool]:
        """The part's token ids, and whether something after its end of turn was left off. Raises DataError."""
        chat, content = self._chat, part.content
        if isinstance(content, ScoreInput):
            return TokenGroup(chat.prompt_ids(content.prompt), [chat.completion_ids(completion) for completion in content.completions]), False
        whole = chat.rendered_text(content) if isinstance(content, str) else chat.rendered_ids(content)
        largest = max(*whole.prompt_ids, *whole.completion_ids)
        if largest >= self._vocab_size:  # the model would fail, and its whole batch with it
            raise DataError(f"The model has no token {largest}, {chat.tokenizer.convert_ids_to_tokens(largest)!r}; it knows {self._vocab_size}.")
        return TokenGroup(whole.prompt_ids, [whole.completion_ids]), whole.was_cut
