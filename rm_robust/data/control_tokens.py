"""Encode text in which some special tokens are control tokens and others, written by people, are plain text.

A chat template writes control tokens. The same characters inside a message must not become one. Such characters are
hidden behind private-use characters while the template is applied:

    hide ─► the template is applied ─► encode(…, hidden=True)

The hidden text is encoded once and as a whole, by a copy of the tokenizer in which every special token has a secret
name. Only the template's tokens are then given that name, so nothing else can become one.
"""

import functools
import json
import re
import secrets
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from rm_robust.errors import DataError

_FIRST, _LAST, _ESCAPE = "\U000f0000", "\U000ffffc", "\U000ffffd"
"""The characters that stand for special tokens, and the one before such a character that a person wrote."""
_HIDDEN = re.compile(f"{_ESCAPE}(.)|[{_FIRST}-{_LAST}]", re.DOTALL)
_RESERVED = re.compile(f"[{_FIRST}-{_ESCAPE}]")


class ControlTokens:
    """The special tokens of one fast tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        # A tokenizer file may list control tokens (Llama 3: <|start_header_id|>) that all_special_tokens leaves out.
        added = [token for token in tokenizer.added_tokens_decoder.values() if token.special]
        self.texts = sorted({*map(str, tokenizer.all_special_tokens), *(token.content for token in added)})
        self.ids = frozenset(self.ids_of(self.texts))
        self._indices = {text: index for index, text in enumerate(self.texts)}
        self._pattern = _any_of(self.texts)
        self._hard = _any_of([token.content for token in added if not (token.normalized or token.single_word)])
        """The tokens that split any text in two that are encoded independently."""
        self._normalized = _any_of([token.content for token in added if token.normalized])
        self._secret = secrets.token_hex(8)

    def ids_of(self, texts: list[str]) -> list[int]:
        """Return the ids of tokens by their texts."""
        ids = self._tokenizer.convert_tokens_to_ids(texts)
        assert isinstance(ids, list)
        return ids

    def spelled_in(self, text: str) -> bool:
        """Return whether the tokenizer would make a control token of some part of the text."""
        normalizer = self._backend.normalizer
        return bool(
            self._pattern.search(text)
            or (normalizer is not None and self._normalized.pattern != _NOTHING)
            and self._normalized.search(normalizer.normalize_str(text))
        )

    def hide(self, text: str) -> str:
        """Return a person's text with one private-use character in the place of every special token."""
        escaped = _RESERVED.sub(lambda match: _ESCAPE + match[0], text)
        return self._pattern.sub(lambda match: chr(ord(_FIRST) + self._indices[match[0]]), escaped)

    @staticmethod
    def keep(text: str) -> str:
        """Return a template's text in the form of `hide`, its special tokens being control tokens."""
        return _RESERVED.sub(lambda match: _ESCAPE + match[0], text)

    def show(self, text: str) -> str:
        """Undo `hide`."""
        return _HIDDEN.sub(lambda match: match[1] or self.texts[ord(match[0]) - ord(_FIRST)], text)

    def last_break(self, text: str) -> int:
        """Return where the last control token begins that separates what is before it from what follows; 0 for none."""
        return max((match.start() for match in self._hard.finditer(text)), default=0)

    def encode(self, texts: list[str], *, hidden: bool) -> list[list[int]]:
        """Return the ids of whole texts without added tokens. Special tokens become control tokens, unless hidden.

        Raises DataError where the model of the tokenizer itself makes a control token of hidden text.
        """
        if not hidden:
            encoded = self._tokenizer(texts, add_special_tokens=False, split_special_tokens=False)
            return [list(ids) for ids in encoded["input_ids"]]
        named = [self._pattern.sub(lambda match: self._name(match[0]), text) for text in texts]
        results = [
            encoding.ids for encoding in self._inert.encode_batch([*map(self.show, named)], add_special_tokens=False)
        ]
        control = self.ids - {self._tokenizer.unk_token_id}
        for text, ids in zip(texts, results, strict=True):
            if sum(token_id in control for token_id in ids) > len(self._pattern.findall(text)):
                raise DataError("The special-token text in these messages cannot be made plain text; remove it.")
        return results

    def _name(self, text: str) -> str:
        return f"\U0010fffd{self._secret}{self._indices[text]}\U0010fffd"

    @property
    def _backend(self) -> Tokenizer:
        backend: Tokenizer = self._tokenizer.backend_tokenizer
        return backend

    @functools.cached_property
    def _inert(self) -> Tokenizer:
        """A copy of the tokenizer in which every special token has a secret name, and keeps its id."""
        parts: dict[str, Any] = json.loads(self._backend.to_str())
        for token in parts["added_tokens"]:
            if token["content"] in self._indices:
                token["content"] = self._name(token["content"])
        model = parts["model"]
        merged = _merged(model)
        names = {text: self._name(text) for text in self.texts if text not in merged}
        # WordPiece, WordLevel and BPE have a table of ids, Unigram a list of pieces with their scores.
        if isinstance(model["vocab"], dict):
            model["vocab"] = {names.get(piece, piece): token_id for piece, token_id in model["vocab"].items()}
        else:
            model["vocab"] = [[names.get(piece, piece), score] for piece, score in model["vocab"]]
        if model.get("unk_token") in names:
            model["unk_token"] = names[model["unk_token"]]
        parts |= {"post_processor": None, "truncation": None, "padding": None}
        inert: Tokenizer = Tokenizer.from_str(json.dumps(parts))
        return inert


def _merged(model: dict[str, Any]) -> set[str]:
    """Return every piece that the merges of a BPE model name."""
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in model.get("merges", [])]
    return {piece for pair in pairs for piece in (*pair, "".join(pair))}


_NOTHING = "(?!)"


def _any_of(texts: list[str]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True))) or _NOTHING)
