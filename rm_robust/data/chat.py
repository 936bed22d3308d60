"""Apply chat templates. No other file does: training, evaluation, serving and RLOO all get their token ids here.

A conversation is rendered with its assistant turn and encoded once, as a whole. Its ids are cut into `prompt_ids`,
which are those of the prompt with the assistant header, and `completion_ids`, which end with the end-of-turn token.
That token is the scored position. What a template writes after it (ChatML: a newline) is not part of the completion.

- Where a token begins in the header and ends in a completion, no cut gives the prompt its own ids. The prompt then ends
  before that token, so that the ids of the conversation stay those of its text. `has_whole_header` tells.
- No begin-of-sequence token is added to the one that the template may write.
- The text of a special token inside a message is encoded as plain text (control_tokens.py).
- A conversation that a caller has rendered gets the same ids. It must end with the end-of-turn token and have the
  begin-of-sequence token as often as the template writes it.
- A template that writes today's date is refused, because the same text would have different ids tomorrow.
- A conversation is refused when the template leaves out one of its turns, or rewrites the completion.
"""

import bisect
import hashlib
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from rm_robust.data.control_tokens import ControlTokens
from rm_robust.data.records import Message, TokenGroup
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
        if not tokenizer.is_fast:
            raise ChatTemplateError(
                f"The tokenizer in {source} has no tokenizer.json, which its token ids are read from. "
                "Convert it (tokenizer.save_pretrained with its fast class), and save it."
            )
        self.template_sha256 = "sha256:" + hashlib.sha256(tokenizer.chat_template.encode()).hexdigest()
        self._control = ControlTokens(tokenizer)
        self.pad_id: int = tokenizer.pad_token_id
        self._refuse_dates()
        self.end_of_turn_id, self.text_after_turn = self._find_end_of_turn()
        """The scored token, and what the template writes after it (ChatML: a newline)."""
        self.end_of_turn = str(tokenizer.convert_ids_to_tokens(self.end_of_turn_id))
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
        text, _, hidden = self._texts(messages, [])
        return self._control.encode([text], hidden=hidden)[0]

    def token_group(self, prompt: str | list[Message], completions: Sequence[str]) -> TokenGroup:
        """Return the ids of a prompt and of its completions: those of each whole conversation, cut in two.

        Raises DataError as prompt_ids does, for text that is not valid Unicode, and for a completion that the template
        rewrites.
        """
        for completion in completions:
            check_text(completion, "The completion")
        text, answers, hidden = self._texts(as_messages(prompt), completions)
        return self._encoded(text, answers, hidden=hidden)

    def completion_ids(self, completion: str) -> list[int]:
        """Return the token ids of one completion after a prompt of one short turn; see token_group."""
        return self.token_group(_PROBE, [completion]).completion_ids[0]

    def has_whole_header(self, prompt_ids: list[int]) -> bool:
        """Return whether a prompt ends with the assistant header, and so where its text ends."""
        return prompt_ids[len(prompt_ids) - len(self.header_ids) :] == self.header_ids

    def completion_text(self, token_ids: list[int]) -> str:
        """Return the text of sampled token ids, without the end-of-turn token that ends a whole completion."""
        if token_ids and token_ids[-1] == self.end_of_turn_id:
            token_ids = token_ids[:-1]
        # Many tokenizers drop the space at the beginning of what they decode, so the header is decoded before it.
        header, whole = self._decode(self.header_ids), self._decode(self.header_ids + token_ids)
        return whole.removeprefix(header)

    def rendered_text(self, text: str) -> RenderedConversation:
        """Tokenise a conversation that a caller has rendered to text.

        The text after the last assistant header is the completion. Its end-of-turn token is its only control token: the
        text of any other special token in it is plain text.

        Raises DataError for text without an assistant turn, without the end-of-turn token at its end, or with more or
        fewer begin-of-sequence tokens than the template writes: such text would get a wrong score.
        """
        check_text(text, "The conversation")
        end = self.end_of_turn
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
        prompt, hidden = before + header, self._control.spelled_in(completion)
        if hidden:
            prompt, completion = self._control.keep(prompt), self._control.hide(completion)
        group = self._encoded(prompt, [completion + end], hidden=hidden)
        self._check_begin(group.prompt_ids)
        return RenderedConversation(group.prompt_ids, group.completion_ids[0], was_cut)

    def rendered_ids(self, token_ids: list[int]) -> RenderedConversation:
        """Split a conversation that a caller has rendered and tokenised into its prompt and its completion.

        Every id stays as it is.

        Raises DataError as rendered_text does, for an id that the tokenizer does not have, and for a control token in
        the completion.
        """
        num_tokens = len(self.tokenizer)  # a slow call, so it is made once
        unknown = [token_id for token_id in token_ids if not 0 <= token_id < num_tokens]
        if unknown:
            raise DataError(f"Token id {unknown[0]} is not one of the tokenizer's {num_tokens}.")
        after = self._encode(self.text_after_turn)
        was_cut = bool(after) and token_ids[-len(after) - 1 :] == [self.end_of_turn_id, *after]
        token_ids = token_ids[: -len(after)] if was_cut else token_ids
        if token_ids[-1:] != [self.end_of_turn_id]:
            raise DataError(
                f"The token ids do not end with {self.end_of_turn_id}, {self.end_of_turn!r}, the end of turn where the "
                "score is read; add it."
            )
        self._check_begin(token_ids)
        start = self._end_of_header(token_ids)
        if not start:
            raise DataError(
                f"The token ids have no assistant turn: the chat template writes {self.header_ids} before it."
            )
        self.check_completion_ids(token_ids[start:-1], "The completion")
        return RenderedConversation(token_ids[:start], token_ids[start:], was_cut)

    def check_completion_ids(self, token_ids: list[int], name: str) -> None:
        """Raise DataError, with the ids' `name`, for a control token before the end of turn.

        Such text would be plain text in a completion that is given as text, and would have another score.
        """
        control = next((token_id for token_id in token_ids if token_id in self._control.ids), None)
        if control is not None and control != self.tokenizer.unk_token_id:
            raise DataError(
                f"{name} holds the control token {control}, {self.tokenizer.convert_ids_to_tokens(control)!r}, before "
                "its end of turn. Encode the completion's text as plain text (split_special_tokens=True)."
            )

    def _end_of_header(self, token_ids: list[int]) -> int:
        """Return the index where the last assistant header ends; 0 if there is none.

        A token may begin in the header and end in the completion. The index is then that of this token.
        """
        num_space = next((n for n, i in enumerate(self.header_ids[::-1]) if self._decode([i]).strip()), 0)
        core, space = self.header_ids[: len(self.header_ids) - num_space], self.header_ids[-num_space:]
        ends = range(len(token_ids) - 1, len(core) - 1, -1) if core else ()
        end = next((end for end in ends if token_ids[end - len(core) : end] == core), 0)
        end = end or self._end_of_header_text(token_ids)
        return end + num_space if num_space and token_ids[end : end + num_space] == space else end

    def _end_of_header_text(self, token_ids: list[int]) -> int:
        """Return where the text of the last assistant header ends in ids that have other tokens for it; 0 for nowhere.

        Decoders add and drop white space, so it is left out.
        """

        def length_of(end: int) -> int:
            return len("".join(self._decode(token_ids[:end]).split()))

        header = "".join(self.header_text.split())
        before, found, _ = "".join(self._decode(token_ids).split()).rpartition(header)
        if not header or not found:
            return 0
        num_characters = len(before) + len(found)
        end = bisect.bisect_left(range(len(token_ids)), num_characters, key=length_of)
        return end if length_of(end) == num_characters else end - 1

    def _check_begin(self, token_ids: list[int]) -> None:
        """Raise DataError unless the ids begin with the begin-of-sequence tokens that the template writes (0 or 1)."""
        bos = self.tokenizer.bos_token_id
        num_bos = next((index for index, token_id in enumerate(token_ids) if token_id != bos), len(token_ids))
        if bos is not None and num_bos != len(self.bos_ids):
            raise DataError(
                f"The conversation begins with {num_bos} begin-of-sequence tokens {self.tokenizer.bos_token!r}; "
                f"the chat template writes {len(self.bos_ids)}."
            )

    def _encode(self, text: str) -> list[int]:
        """Return the ids of text that a template wrote."""
        return self._control.encode([text], hidden=False)[0]

    def _decode(self, token_ids: list[int]) -> str:
        return str(self.tokenizer.decode(token_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def _encoded(self, prompt: str, answers: list[str], *, hidden: bool) -> TokenGroup:
        """Encode each conversation, prompt + answer, as a whole and cut off the ids that are the prompt's.

        What lies before the last control token of the prompt is encoded once, because it cannot change any later id.
        """
        last = prompt[self._control.last_break(prompt) :]
        prompt_ids, last_ids, *conversations = self._control.encode(
            [prompt, last, *(last + answer for answer in answers)], hidden=hidden
        )
        num_own = min((len(os.path.commonprefix([last_ids, ids])) for ids in conversations), default=len(last_ids))
        kept = prompt_ids[: len(prompt_ids) - len(last_ids) + num_own]
        if not kept:
            raise DataError("No token ends where the prompt ends, so the prompt has no token ids of its own.")
        return TokenGroup(kept, [ids[num_own:] for ids in conversations])

    def _texts(self, messages: list[Message], completions: Sequence[str]) -> tuple[str, list[str], bool]:
        """Return the rendered prompt, what follows it with each completion, and whether special-token text is hidden.

        Raises DataError for a turn that the template leaves out and a completion that it rewrites.
        """
        if len(messages) > 1:
            self._refuse_dropped_turns(messages)
        prompt, answers = self._rendered(messages, completions)
        if not any(map(self._control.spelled_in, [*(m["content"] for m in messages), *completions])):
            return prompt, answers, False
        hide, show = self._control.hide, self._control.show
        hidden_prompt, hidden_answers = self._rendered(
            [{**message, "content": hide(message["content"])} for message in messages], [*map(hide, completions)]
        )
        if [show(text) for text in (hidden_prompt, *hidden_answers)] != [prompt, *answers]:
            raise DataError(
                f"The chat template of {self.source} rewrites or drops messages, so the special-token text in them "
                "cannot be made inert; remove it from the prompt."
            )
        return hidden_prompt, hidden_answers, True

    def _rendered(self, messages: list[Message], completions: Sequence[str]) -> tuple[str, list[str]]:
        """Return the rendered prompt, and what each conversation has after it up to its end of turn."""
        prompt = self._render(messages, add_generation_prompt=True)
        return prompt, [self._answer(prompt, messages, completion) for completion in completions]

    def _answer(self, prompt: str, messages: list[Message], completion: str) -> str:
        conversation = self._render(
            [*messages, {"role": "assistant", "content": completion}], add_generation_prompt=False
        )
        answer = conversation.removeprefix(prompt).removesuffix(self.text_after_turn)
        body = answer.removesuffix(self.end_of_turn)
        if not conversation.startswith(prompt) or body == answer or body.strip() != completion.strip():
            raise DataError(
                f"The chat template of {self.source} rewrites the completion {completion!r:.{MOST_QUOTED}}: it writes "
                f"{conversation[len(os.path.commonprefix([conversation, prompt])) :]!r:.{MOST_QUOTED}}. "
                "Save a template that writes it as it is with the tokenizer, or remove the row."
            )
        return answer

    def _render(self, messages: list[Message], *, add_generation_prompt: bool, **variables: Any) -> str:
        arguments: dict[str, Any] = {"tokenize": False, "add_generation_prompt": add_generation_prompt, **variables}
        try:
            return str(self.tokenizer.apply_chat_template(messages, **arguments))
        except Exception as error:  # a template can make jinja raise any exception
            raise DataError(
                f"The chat template of {self.source} refuses these turns ({_roles(messages)}): {error}."
            ) from error

    def _written_contents(self, messages: list[Message]) -> set[int]:
        """Return the indices of the messages whose contents the template writes.

        One rendering finds them all, because a request may hold a hundred thousand short messages.
        """
        marked = self._render(
            [{**m, "content": f"\ue000{index}\ue001"} for index, m in enumerate(messages)], add_generation_prompt=True
        )
        return {int(number) for number in re.findall("\ue000([0-9]+)\ue001", marked)}

    def _refuse_dropped_turns(self, messages: list[Message]) -> None:
        """Raise DataError for a turn that the template leaves out.

        Two prompts that differ only in such a turn would have the same ids and the same scores.
        """
        written = self._written_contents(messages)
        dropped = [f"{message['role']} turn {i}" for i, message in enumerate(messages) if i not in written]
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
        before, found, tail = conversation.removeprefix(prompt).partition(_PROBE)
        if not conversation.startswith(prompt) or not found or before.strip():
            raise ChatTemplateError(
                f"The chat template of {self.source} does not continue its own generation prompt: an answer is "
                f"rendered as {conversation[-60:]!r} after a prompt that ends in {prompt[-30:]!r}. Use a template "
                "whose training and generation forms agree."
            )
        longest_first = sorted(self._control.texts, key=len, reverse=True)
        end = next((text for text in longest_first if tail.lstrip().startswith(text)), None)
        if end is None:
            raise ChatTemplateError(
                f"The chat template of {self.source} does not end an assistant turn with a special token (it writes "
                f"{tail!r}). The score is read there: end the turn with the model's end-of-turn token."
            )
        _, _, after = tail.partition(end)
        [end_id] = self._control.ids_of([end])
        return end_id, after


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
