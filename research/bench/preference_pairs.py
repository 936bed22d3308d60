"""Read real preference pairs, tokenise them with a tokenizer made from their text, and make a random reward model.

The benchmarks train and serve that model.
"""

import contextlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from random import Random

import pyarrow.compute as pc
import pyarrow.parquet as pq
from transformers import PreTrainedTokenizerFast

from rm_robust.config.training import ModelConfig
from rm_robust.data.chat import ChatFormat
from rm_robust.data.demonstrations import make_tokenizer, save_base_model
from rm_robust.data.records import Message, TokenGroup
from rm_robust.errors import DataError
from rm_robust.models.reward_model import new_reward_model

SEED = 0
MAX_SEQUENCE_TOKENS = 1024
TURN = re.compile(r"(?:^|\n\n)(Human|Assistant): ?")
ROLES = {"Human": "user", "Assistant": "assistant"}


@dataclass(frozen=True)
class TextPair:
    prompt: list[Message]
    chosen: str
    rejected: str


@dataclass(frozen=True)
class Corpus:
    """The pairs whose prompt + completion fit MAX_SEQUENCE_TOKENS on both sides, shuffled. The others are counted."""

    chat: ChatFormat
    pairs: list[TokenGroup]
    num_too_long: int
    num_refused: int
    """The number of rows that rm_robust refuses, for example because the last user turn is empty."""

    @property
    def description(self) -> str:
        prompts = sum(len(pair.prompt_ids) for pair in self.pairs) / len(self.pairs)
        completions = sum(len(ids) for pair in self.pairs for ids in pair.completion_ids) / len(self.pairs) / 2
        left_out = f"left out: {self.num_too_long} too long, {self.num_refused} refused"
        return f"{len(self.pairs)} pairs (mean prompt {prompts:.0f}, completion {completions:.0f} tokens); {left_out}"


def hh_rlhf_dialogues(data_dir: Path) -> list[TextPair]:
    """Return the hh-rlhf rows of human_pairs.parquet.

    Their prompts have the form `Human: … \\n\\nAssistant: …` and end in a human turn.
    """
    table = pq.read_table(data_dir / "human_pairs.parquet", columns=["source", "prompt", "chosen", "rejected"])
    rows = table.filter(pc.starts_with(table["source"], "hh-rlhf/")).to_pylist()
    return [TextPair(_turns(row["prompt"]), row["chosen"], row["rejected"]) for row in rows]


def rmb_pairs(data_dir: Path) -> list[TextPair]:
    """Return all rows of rmb_pairs.parquet: answers of strong models, much longer than hh-rlhf's."""
    rows = pq.read_table(data_dir / "rmb_pairs.parquet", columns=["messages", "chosen", "rejected"]).to_pylist()
    return [TextPair(row["messages"], row["chosen"], row["rejected"]) for row in rows]


def _turns(prompt: str) -> list[Message]:
    before, *rest = TURN.split(prompt)
    assert not before.strip(), f"a dialogue that does not begin with a turn: {prompt[:80]!r}"
    return [{"role": ROLES[who], "content": content} for who, content in zip(rest[::2], rest[1::2], strict=True)]


def tokenise(pairs: list[TextPair], *, vocab_size: int, folder: Path) -> Corpus:
    """Train a tokenizer on the pairs' text, and return the pairs as its token ids.

    `folder` names the tokenizer in messages.
    """
    tokenizer = make_tokenizer(texts_of(pairs), vocab_size=vocab_size)
    assert len(tokenizer) == vocab_size, f"the text gives only {len(tokenizer)} tokens"
    chat = ChatFormat(tokenizer, source=str(folder))
    groups: list[TokenGroup] = []
    for pair in pairs:
        with contextlib.suppress(DataError):
            groups.append(
                TokenGroup(
                    chat.prompt_ids(pair.prompt), [chat.completion_ids(pair.chosen), chat.completion_ids(pair.rejected)]
                )
            )
    fitting = [
        g for g in groups if all(len(g.prompt_ids) + len(ids) <= MAX_SEQUENCE_TOKENS for ids in g.completion_ids)
    ]
    Random(SEED).shuffle(fitting)
    return Corpus(chat, fitting, len(groups) - len(fitting), len(pairs) - len(groups))


def texts_of(pairs: list[TextPair]) -> Iterable[str]:
    for pair in pairs:
        yield from (message["content"] for message in pair.prompt)
        yield from (pair.chosen, pair.rejected)


def save_reward_model(folder: Path, model: ModelConfig, chat: ChatFormat) -> int:
    """Save a reward model with random weights, also in its head, and return its number of parameters."""
    base = folder / "base"
    assert isinstance(chat.tokenizer, PreTrainedTokenizerFast)
    save_base_model(base, model, chat.tokenizer, seed=SEED)
    reward_model = new_reward_model(base, pad_id=chat.pad_id, seed=SEED)
    reward_model.save_pretrained(folder / "reward_model")
    return sum(parameter.numel() for parameter in reward_model.parameters())
