"""Apply chat templates. No other file does: training, evaluation, serving and RLOO all get their token ids here.

A conversation becomes `prompt_ids` (every turn before the completion, plus the assistant header) and `completion_ids`
(the completion's text plus the template's end-of-turn token). The end-of-turn token is the scored position. What a
template writes after it (ChatML: a newline) is not part of the completion.

- No begin-of-sequence token is added to the one that the template may write.
- The text of a special token inside a message is encoded as plain text.
- A conversation that a caller has rendered gets the same ids. It must end with the end-of-turn token and have the
  begin-of-sequence token as often as the template writes it.
- A template that writes today's date is refused, because the same text would have different ids tomorrow.
- A conversation is refused when the template leaves out one of its turns.
"""

import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from rm_robust.data.records import Message
from rm_robust.errors import ChatTemplateError, DataError

ROLES = ("system", "user", "assistant")
MOST_QUOTED = 100
"""The largest number of characters of a caller's text that an error message quotes."""
_PROBE = "rm robust probe"
"""The content of messages that are rendered to learn what a template writes around them."""
_PROBE_ENDS = ("probe", "7", "?", "(é)", "。")
"""Contents that end in different characters. So the text that all their prompts end with is the template's own."""


@dataclass(frozen=True)
class RenderedConversation:
    """The token ids of a conversation that a caller has rendered, split into its prompt and its completion."""

    prompt_ids: list[int]
    completion_ids: list[int]
    was_cut: bool
    """Whether the caller's conversation had the template's text after the end of turn. The ids leave it out."""


class ChatFormat:
    """One tokenizer with its chat template. It turns conversations into token ids, and sampled ids into text."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, source: str) -> None:
        """Check the tokenizer and learn what its template writes. `source` names it in messages.

        Raises ChatTemplateError for a tokenizer that would make scores wrong, for example one without a chat template,
        or one whose pad token is also its end-of-turn token.
        """
        self.tokenizer = tokenizer
        self.source = source
        if not tokenizer.chat_template:
            raise ChatTemplateError(
                f"The tokenizer in {source} has no chat template. Save the template it was trained with "
                "(tokenizer.chat_template = …) there."
            )
        if not isinstance(tokenizer.chat_template, str):
            raise ChatTemplateError(
                f"The tokenizer in {source} has several named chat templates: {sorted(tokenizer.chat_template)}. "
                "Save the one to use as its only template."
            )
        if tokenizer.pad_token_id is None:
            raise ChatTemplateError(
                f"The tokenizer in {source} has no pad token. Set tokenizer.pad_token to a token that never occurs in "
                "text, and save it."
            )
        self.template_sha256 = "sha256:" + hashlib.sha256(tokenizer.chat_template.encode()).hexdigest()
        # A tokenizer file may list control tokens (Llama 3: <|start_header_id|>) that all_special_tokens leaves out.
        added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
        self._special_texts = sorted({*map(str, tokenizer.all_special_tokens), *added})
        self.pad_id: int = tokenizer.pad_token_id
        self._refuse_dates()
        self.end_of_turn_id, self.text_after_turn = self._find_end_of_turn()
        """The scored token, and what the template writes after it (ChatML: a newline)."""
        if self.pad_id == self.end_of_turn_id:
            raise ChatTemplateError(
                f"In {source} the pad token {tokenizer.pad_token!r} is also the end-of-turn token, so every end of "
                "turn would be read as padding. Set tokenizer.pad_token to another token, and save it."
            )
        probes = [self.prompt_ids(content) for content in _PROBE_ENDS]
        self.header_ids = _common_suffix(probes)
        """The ids that every prompt ends with: the end of the user's turn and the assistant header."""
        self.header_text = self._find_header_text()
        bos = tokenizer.bos_token_id
        self.bos_ids: list[int] = [bos] if bos is not None and probes[0][0] == bos else []
        """The begin-of-sequence token; empty where the template writes none."""

    @classmethod
    def load(cls, model_dir: Path | str) -> "ChatFormat":
        """Load the chat format saved with a model. `model_dir` is a local folder or a hub name."""
        try:
            tokenizer = AutoTokenizer.from_pretrained(str(model_dir), trust_remote_code=False)
        except (OSError, ValueError) as error:
            raise ChatTemplateError(f"No tokenizer can be loaded from {model_dir}: {error}") from error
        return cls(tokenizer, source=str(model_dir))

    def prompt_ids(self, prompt: str | list[Message]) -> list[int]:
        """Return the token ids of a prompt, up to and including the assistant header. A text is one user turn.

        Raises DataError for a malformed conversation, and for one with a turn that the template leaves out.
        """
        messages = as_messages(prompt)
        rendered = self._render(messages, add_generation_prompt=True)
        if len(messages) > 1:
            self._refuse_dropped_turns(messages)
        if not any(special in message["content"] for message in messages for special in self._special_texts):
            return self._encode(rendered, control_tokens=True)
        return self._encode_with_inert_contents(messages, rendered)

    def completion_ids(self, completion: str) -> list[int]:
        """Return the token ids of one completion, its end-of-turn token (the scored position) last.

        Raises DataError for text that is not valid Unicode.
        """
        check_text(completion, "The completion")
        return [*self._encode(completion, control_tokens=False), self.end_of_turn_id]

    def completion_text(self, token_ids: list[int]) -> str:
        """Return the text of sampled token ids, without the end-of-turn token that ends a whole completion."""
        if token_ids and token_ids[-1] == self.end_of_turn_id:
            token_ids = token_ids[:-1]
        return str(self.tokenizer.decode(token_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def rendered_text(self, text: str) -> RenderedConversation:
        """Tokenise a conversation that a caller has rendered to text.

        The text after the last assistant header is the completion. Its end-of-turn token is its only control token: the
        text of any other special token in it is plain text.

        Raises DataError for text without an assistant turn, without the end-of-turn token at its end, or with more or
        fewer begin-of-sequence tokens than the template writes: such text would get a wrong score.
        """
        check_text(text, "The conversation")
        end = str(self.tokenizer.convert_ids_to_tokens(self.end_of_turn_id))
        was_cut = bool(self.text_after_turn) and text.endswith(end + self.text_after_turn)
        text = text.removesuffix(self.text_after_turn) if was_cut else text
        if not text.endswith(end):
            raise DataError(
                f"The conversation does not end with {end!r}, the end-of-turn token of the chat template, where the "
                "score is read; add it."
            )
        before, header, completion = (
            text.removesuffix(end).rpartition(self.header_text) if self.header_text else ("", "", "")
        )
        if not header:
            raise DataError(
                f"The conversation has no assistant turn: the chat template writes {self.header_text!r} before it."
            )
        prompt_ids = self._encode(before + header, control_tokens=True)
        self._check_begin(prompt_ids)
        return RenderedConversation(prompt_ids, self.completion_ids(completion), was_cut)

    def rendered_ids(self, token_ids: list[int]) -> RenderedConversation:
        """Split a conversation that a caller has rendered and tokenised into its prompt and its completion.

        Every id stays as it is, so the completion may hold further control tokens.

        Raises DataError as rendered_text does, and for an id that the tokenizer does not have.
        """
        num_tokens = len(self.tokenizer)  # a slow call, so it is made once
        unknown = [token_id for token_id in token_ids if not 0 <= token_id < num_tokens]
        if unknown:
            raise DataError(f"Token id {unknown[0]} is not one of the tokenizer's {num_tokens}.")
        after = self._encode(self.text_after_turn, control_tokens=True)
        was_cut = bool(after) and token_ids[-len(after) - 1 :] == [self.end_of_turn_id, *after]
        token_ids = token_ids[: -len(after)] if was_cut else token_ids
        if token_ids[-1:] != [self.end_of_turn_id]:
            end = self.tokenizer.convert_ids_to_tokens(self.end_of_turn_id)
            raise DataError(
                f"The token ids do not end with {self.end_of_turn_id}, {end!r}, the end of turn where the score is "
                "read; add it."
            )
        self._check_begin(token_ids)
        header, num_header = self.header_ids, len(self.header_ids)
        starts = (
            [i for i in range(len(token_ids) - 1, num_header - 1, -1) if token_ids[i - num_header : i] == header]
            if header
            else []
        )
        if not starts:
            raise DataError(
                f"The token ids have no assistant turn: the chat template writes {self.header_ids} before it."
            )
        return RenderedConversation(token_ids[: starts[0]], token_ids[starts[0] :], was_cut)

    def _check_begin(self, token_ids: list[int]) -> None:
        """Raise DataError unless the ids begin with the begin-of-sequence tokens that the template writes (0 or 1)."""
        bos = self.tokenizer.bos_token_id
        num_bos = next((index for index, token_id in enumerate(token_ids) if token_id != bos), len(token_ids))
        if bos is not None and num_bos != len(self.bos_ids):
            raise DataError(
                f"The conversation begins with {num_bos} begin-of-sequence tokens {self.tokenizer.bos_token!r}; "
                f"the chat template writes {len(self.bos_ids)}."
            )

    def _encode(self, text: str, *, control_tokens: bool) -> list[int]:
        """Return the ids of a text, in which the text of a special token is that token or, if not set, plain text."""
        encoded = self.tokenizer(text, add_special_tokens=False, split_special_tokens=not control_tokens)
        return list(encoded["input_ids"])

    def _render(self, messages: list[Message], *, add_generation_prompt: bool, **variables: Any) -> str:
        arguments: dict[str, Any] = {"tokenize": False, "add_generation_prompt": add_generation_prompt, **variables}
        try:
            return str(self.tokenizer.apply_chat_template(messages, **arguments))
        except Exception as error:  # a template can make jinja raise any exception
            raise DataError(
                f"The chat template of {self.source} refuses these turns ({_roles(messages)}): {error}."
            ) from error

    def _encode_with_inert_contents(self, messages: list[Message], rendered: str) -> list[int]:
        """Return a prompt's ids where a content spells a special token.

        The template's own text and the contents are encoded separately, so that no content gives a control token.
        """
        pieces, written = self._template_pieces(messages)
        contents = [m["content"] for m in messages]
        # A template writes the contents as they are, or without the white space at their ends.
        for candidate in (contents, [content.strip() for content in contents]):
            filled = [
                part for piece, content in zip(pieces, [*candidate, ""], strict=False) for part in (piece, content)
            ]
            if written == list(range(len(messages))) and "".join(filled) == rendered:
                return [
                    token_id
                    for index, part in enumerate(filled)
                    for token_id in self._encode(part, control_tokens=index % 2 == 0)
                ]
        raise DataError(
            f"The chat template of {self.source} rewrites or drops messages, so the special-token text in them cannot "
            "be made inert; remove it from the prompt."
        )

    def _template_pieces(self, messages: list[Message]) -> tuple[list[str], list[int]]:
        """Return the texts that the template writes around the contents, and the indices of the contents between them.

        One rendering finds them all, because a request may hold a hundred thousand short messages.
        """
        marked = self._render(
            [{**m, "content": f"\ue000{index}\ue001"} for index, m in enumerate(messages)], add_generation_prompt=True
        )
        parts = re.split("\ue000([0-9]+)\ue001", marked)
        return parts[::2], [int(number) for number in parts[1::2]]

    def _refuse_dropped_turns(self, messages: list[Message]) -> None:
        """Raise DataError for a turn that the template leaves out.

        Two prompts that differ only in such a turn would have the same ids and the same scores.
        """
        _, written = self._template_pieces(messages)
        dropped = [
            f"{messages[index]['role']} turn {index}" for index in sorted(set(range(len(messages))) - set(written))
        ]
        if dropped:
            raise DataError(
                f"The chat template of {self.source} leaves out {', '.join(dropped):.{MOST_QUOTED}} of these turns "
                f"({_roles(messages)}). Use a template that writes every turn, or remove the turn from the row."
            )

    def _refuse_dates(self) -> None:
        """Raise ChatTemplateError for a template whose text depends on the date.

        transformers gives every template the clock, as the function strftime_now.
        """
        user: list[Message] = [{"role": "user", "content": _PROBE}]
        for turns in (user, [{"role": "system", "content": _PROBE}, *user]):
            try:
                first_day, second_day = (
                    self._render(turns, add_generation_prompt=True, strftime_now=lambda _, day=day: day)
                    for day in ("1 Jan 2001", "2 Feb 2002")
                )
            except DataError:
                continue  # the template takes no system turn; _find_end_of_turn refuses one that takes no user turn
            if first_day != second_day:
                raise ChatTemplateError(
                    f"The chat template of {self.source} writes the current date into the prompt, so the same text "
                    "would have other token ids, and other scores, on another day. Replace strftime_now(…) in "
                    "tokenizer.chat_template by a fixed date, e.g. '26 Jul 2024', and save it."
                )

    def _find_header_text(self) -> str:
        """Return the text that every prompt ends with.

        It is the text of header_ids, or a little more where several tokens share a character.
        """
        rendered = [
            self._render([{"role": "user", "content": content}], add_generation_prompt=True) for content in _PROBE_ENDS
        ]
        return os.path.commonprefix([text[::-1] for text in rendered])[::-1]

    def _find_end_of_turn(self) -> tuple[int, str]:
        """Return the id of the special token that the template writes right after an answer, and the text after it."""
        turns: list[Message] = [{"role": "user", "content": _PROBE}]
        try:
            prompt = self._render(turns, add_generation_prompt=True)
            conversation = self._render([*turns, {"role": "assistant", "content": _PROBE}], add_generation_prompt=False)
        except DataError as error:
            raise ChatTemplateError(
                f"{error} Use a template that renders one user turn and one assistant turn."
            ) from error
        if not conversation.startswith(prompt + _PROBE):
            raise ChatTemplateError(
                f"The chat template of {self.source} does not continue its own generation prompt: an answer is "
                f"rendered as {conversation[-60:]!r} after a prompt that ends in {prompt[-30:]!r}. Use a template "
                "whose training and generation forms agree."
            )
        tail = conversation[len(prompt + _PROBE) :]
        tail_ids = self._encode(tail, control_tokens=True)
        if not tail_ids or self.tokenizer.convert_ids_to_tokens(tail_ids[0]) not in self._special_texts:
            raise ChatTemplateError(
                f"The chat template of {self.source} does not end an assistant turn with a special token (it writes "
                f"{tail!r}). The score is read there: end the turn with the model's end-of-turn token."
            )
        _, _, after = tail.partition(str(self.tokenizer.convert_ids_to_tokens(tail_ids[0])))
        return tail_ids[0], after


def _roles(messages: list[Message]) -> str:
    return f"{[m['role'] for m in messages]!r:.{MOST_QUOTED}}"


def _common_suffix(sequences: list[list[int]]) -> list[int]:
    backwards = os.path.commonprefix([ids[::-1] for ids in sequences])
    return list(backwards[::-1])


def as_messages(prompt: object) -> list[Message]:
    """Return a prompt as messages: a text becomes one user turn, and a list of turns is checked.

    Each message is reduced to its role and content, so that the template sees nothing else. Raises DataError that names
    the bad turn.
    """
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if not isinstance(prompt, list):
        raise DataError(f"A prompt must be text or a list of messages, got a {type(prompt).__name__}.")
    if not prompt:
        raise DataError("A prompt needs at least one message, got an empty list.")
    messages = [_as_message(message, index) for index, message in enumerate(prompt)]
    if messages[-1]["role"] != "user":
        raise DataError(f"A prompt must end with a user message, got {messages[-1]['role']!r} last.")
    if not messages[-1]["content"].strip():
        raise DataError("The last user message of a prompt is empty.")
    return messages


def _as_message(message: object, index: int) -> Message:
    if not isinstance(message, dict) or not {"role", "content"} <= set(message):
        raise DataError(f'Message {index} must be {{"role": …, "content": …}}, got {message!r:.{MOST_QUOTED}}.')
    if message["role"] not in ROLES:
        raise DataError(f"Message {index} has role {message['role']!r:.{MOST_QUOTED}}; roles are {', '.join(ROLES)}.")
    if not isinstance(message["content"], str):
        raise DataError(f"Message {index} has a {type(message['content']).__name__} as content; it must be text.")
    check_text(message["content"], f"Message {index}")
    return {"role": message["role"], "content": message["content"]}


def check_text(text: str, name: str) -> None:
    """Raise DataError, with the text's `name`, for text that is not valid Unicode.

    JSON can spell half a surrogate pair, which no encoding can represent.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{name} is not valid Unicode ({error.reason} at character {error.start}).") from error
