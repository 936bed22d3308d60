"""Prepare what the scoring bench sends and expects.

This file makes the model that all servers load, the conversations that they score, each server's JSON for a
conversation, and the scores that must come back.
"""

import contextlib
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import pyarrow.parquet as pq
import torch
from transformers import AutoModelForSequenceClassification

from research.bench.preference_pairs import MAX_SEQUENCE_TOKENS, SEED, TextPair
from rm_robust.config.training import ModelConfig
from rm_robust.data.chat import ChatFormat
from rm_robust.data.demonstrations import make_tokenizer, save_base_model
from rm_robust.data.records import Message
from rm_robust.errors import DataError
from rm_robust.models.checkpoint import commit_checkpoint
from rm_robust.models.reward_model import new_reward_model

VLLM_MODEL_NAME = "reward_model"
NUM_COMPLETIONS_OF_A_LIST = 4
LIST_TOKENS = 8192
"""The most tokens of prompt + one completion.

With fewer tokens, lists with several turns, which have the long prompts, would be left out.
"""


@dataclass(frozen=True)
class Candidates:
    """A prompt with one completion or several, and all its tokens."""

    prompt: list[Message]
    completions: list[str]
    prompt_ids: list[int]
    completion_ids: list[list[int]]

    @property
    def sequences(self) -> list[list[int]]:
        return [self.prompt_ids + ids for ids in self.completion_ids]

    def split(self) -> list["Candidates"]:
        """Return the same completions, each alone with the prompt."""
        return [
            Candidates(self.prompt, [text], self.prompt_ids, [ids])
            for text, ids in zip(self.completions, self.completion_ids, strict=True)
        ]


@dataclass(frozen=True)
class LeftOut:
    """The numbers of conversations that were left out."""

    max_tokens: int
    """The most tokens of prompt + one completion."""
    num_too_long: int
    num_refused: int
    num_otherwise_tokenised: int
    """The number of conversations whose rendered text has other tokens than prompt and completion tokenised apart.

    Not all servers would score the same tokens there.
    """


def save_scoring_checkpoint(folder: Path, config: ModelConfig, texts: Iterable[str]) -> int:
    """Commit a reward model to `folder` and return its number of parameters.

    It has random weights, and a tokenizer made from `texts`.
    """
    tokenizer = make_tokenizer(texts, vocab_size=config.vocab_size)
    assert len(tokenizer) == config.vocab_size, f"the texts give only {len(tokenizer)} tokens"
    base = folder.parent / f"{folder.name}_base"
    save_base_model(base, config, tokenizer, seed=SEED)
    chat = ChatFormat(tokenizer, source=str(base))
    model = new_reward_model(base, pad_id=chat.pad_id, seed=SEED)
    with torch.no_grad():
        for weight in model.model.layers.parameters():
            # With this scale a score depends on every token, and no attention is so sharp that it magnifies rounding.
            if weight.dim() == 2:
                weight.mul_(4 * math.sqrt(32 / config.hidden_size))

    def write(target: Path) -> None:
        model.save_pretrained(target)
        tokenizer.save_pretrained(target)

    commit_checkpoint(folder, write, kind="reward_model", template_sha256=chat.template_sha256, training={"seed": SEED})
    return sum(parameter.numel() for parameter in model.parameters())


def dialogues(pairs: Sequence[TextPair], chat: ChatFormat) -> tuple[list[Candidates], LeftOut]:
    """Return chosen and rejected of every pair, one after the other, each alone with the prompt.

    The pairs are shuffled, and no conversation occurs twice.
    """
    kept, left_out = usable(
        [(pair.prompt, [pair.chosen, pair.rejected]) for pair in pairs], chat, max_tokens=MAX_SEQUENCE_TOKENS
    )
    return [single for candidates in kept for single in candidates.split()], left_out


def best_of_n_lists(data_dir: Path, chat: ChatFormat) -> tuple[list[Candidates], LeftOut]:
    """Return the lists of rmb_bon.parquet, shuffled. A list has the best answer and three worse ones."""
    rows = pq.read_table(data_dir / "rmb_bon.parquet", columns=["messages", "best", "losers"]).to_pylist()
    num_losers = NUM_COMPLETIONS_OF_A_LIST - 1
    lists = [
        (row["messages"], [row["best"], *row["losers"][:num_losers]])
        for row in rows
        if len(row["losers"]) >= num_losers
    ]
    return usable(lists, chat, max_tokens=LIST_TOKENS)


def usable(
    rows: Sequence[tuple[list[Message], list[str]]], chat: ChatFormat, *, max_tokens: int
) -> tuple[list[Candidates], LeftOut]:
    """Return the rows, shuffled, whose sequences all fit, are distinct, and have the same tokens as rendered text."""
    kept: list[Candidates] = []
    seen: set[tuple[int, ...]] = set()
    num_too_long = num_refused = num_other = 0
    for prompt, completions in rows:
        candidates = None
        with contextlib.suppress(DataError):
            candidates = Candidates(
                prompt, completions, chat.prompt_ids(prompt), [chat.completion_ids(text) for text in completions]
            )
        if (
            candidates is None
            or not {tuple(ids) for ids in candidates.sequences}.isdisjoint(seen)
            or len(set(completions)) < len(completions)
        ):
            num_refused += 1
        elif max(map(len, candidates.sequences)) > max_tokens:
            num_too_long += 1
        elif any(tokens_of(rendered(single, chat), chat) != single.sequences[0] for single in candidates.split()):
            num_other += 1
        else:
            seen |= {tuple(ids) for ids in candidates.sequences}
            kept.append(candidates)
    Random(SEED).shuffle(kept)
    return kept, LeftOut(max_tokens, num_too_long, num_refused, num_other)


def rendered(single: Candidates, chat: ChatFormat) -> str:
    """Return the conversation as text, up to and including its end-of-turn token."""
    before = chat.tokenizer.apply_chat_template(single.prompt, tokenize=False, add_generation_prompt=True)
    return f"{before}{single.completions[0]}{chat.tokenizer.convert_ids_to_tokens(chat.end_of_turn_id)}"


def tokens_of(text: str, chat: ChatFormat) -> list[int]:
    return list(chat.tokenizer(text, add_special_tokens=False)["input_ids"])


def openrlhf_body(single: Candidates, chat: ChatFormat) -> bytes:
    return json.dumps({"query": [rendered(single, chat)]}).encode()


def vllm_body(single: Candidates, chat: ChatFormat) -> bytes:
    return json.dumps(
        {
            "model": VLLM_MODEL_NAME,
            "input": rendered(single, chat),
            "add_special_tokens": False,
            "use_activation": False,
        }
    ).encode()


def our_body(candidates: Candidates, _: ChatFormat) -> bytes:
    return json.dumps({"inputs": [{"prompt": candidates.prompt, "completions": candidates.completions}]}).encode()


def openrlhf_scores(reply: Any) -> list[float]:
    return list(reply["rewards"])


def vllm_scores(reply: Any) -> list[float]:
    return [entry["probs"][0] for entry in reply["data"]]


def our_scores(reply: Any) -> list[float]:
    return [score for result in reply["results"] for score in result["scores"]]


class Reference:
    """The scores of plain transformers, one sequence at a time and without padding. Each score is computed once."""

    def __init__(self, checkpoint: Path) -> None:
        self._model = AutoModelForSequenceClassification.from_pretrained(str(checkpoint), dtype=torch.float32).eval()
        self._scores: dict[tuple[int, ...], float] = {}

    def scores(self, candidates: Candidates) -> list[float]:
        return [self._score(tuple(ids)) for ids in candidates.sequences]

    def _score(self, token_ids: tuple[int, ...]) -> float:
        if token_ids not in self._scores:
            with torch.inference_mode():
                self._scores[token_ids] = float(
                    self._model(input_ids=torch.tensor([token_ids]), use_cache=False).logits[0, 0]
                )
        return self._scores[token_ids]
