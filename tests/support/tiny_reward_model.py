"""Commit a tiny random reward model with its own tokenizer as a checkpoint that serving loads, without training."""

from pathlib import Path
from random import Random

import torch

from rm_robust.config.training import ModelConfig
from rm_robust.data.chat import ChatFormat
from rm_robust.data.demonstrations import make_tokenizer, save_base_model
from rm_robust.models.checkpoint import commit_checkpoint
from rm_robust.models.reward_model import new_reward_model

WORDS = [
    "red",
    "green",
    "blue",
    "seven",
    "apple",
    "river",
    "stone",
    "quiet",
    "answer",
    "please",
    "list",
    "the",
    "and",
    "of",
    "is",
    "not",
]
NUM_POSITIONS = 256


def text(rng: Random, *, num_words: int) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(num_words))


def save_tiny_reward_model(folder: Path, *, seed: int = 0, weight_scale: float = 4, **training: float) -> Path:
    """Commit a model of about 30,000 parameters to `folder`, with scores around N(0, 1).

    `training` is added to the seed in its manifest.
    """
    rng = Random(seed)
    tokenizer = make_tokenizer([text(rng, num_words=20) for _ in range(50)], vocab_size=320)
    config = ModelConfig(
        hidden_size=32,
        intermediate_size=64,
        num_layers=2,
        num_heads=1,
        num_kv_heads=1,
        max_position_embeddings=NUM_POSITIONS,
    )
    base = folder.parent / f"{folder.name}_base"
    save_base_model(base, config, tokenizer, seed=seed)
    chat = ChatFormat(tokenizer, source=str(base))
    model = new_reward_model(base, pad_id=chat.pad_id, seed=seed)
    with torch.no_grad():
        for weight in model.model.layers.parameters():
            weight.mul_(weight_scale)  # so that a score depends on every token, not on the last one alone

    def write(target: Path) -> None:
        model.save_pretrained(target)
        tokenizer.save_pretrained(target)

    commit_checkpoint(
        folder, write, kind="reward_model", template_sha256=chat.template_sha256, training={"seed": seed, **training}
    )
    return folder
