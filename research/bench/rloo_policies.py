"""Make the policies that the RLOO bench trains.

They are fine-tuned on the embedded world just long enough to end their answers by themselves.
"""

import json
import multiprocessing as mp
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from research.bench.rloo_turns import PASSIVE
from rm_robust.config.data import WorldConfig
from rm_robust.config.run import PipelineConfig
from rm_robust.config.training import ModelConfig, SftConfig
from rm_robust.data.chat import ChatFormat
from rm_robust.data.demonstrations import make_tokenizer, save_base_model
from rm_robust.data.rows import RowKind
from rm_robust.data.world.corpus import write_world
from rm_robust.models.policy import load_policy
from rm_robust.runs.layout import RunLayout
from rm_robust.training.sft import train_sft
from tests.support.tiny_models import write_token_groups

SEED = 0
WORLD = WorldConfig(num_sft_examples=3000, num_training_prompts=8, num_validation_prompts=8, num_rloo_prompts=32)
"""The world of the policies.

It has as many RLOO prompts as a step, so all trainers' steps have the same prompts in different orders, and differ only
in what is sampled.
"""
MAX_TOKENS = 96
"""The most tokens of a prompt, and of a completion (PipelineConfig's default). Rows with longer texts are left out."""


@dataclass(frozen=True)
class Policy:
    """A committed checkpoint, and tokenised prompts as in the folder rloo/prompts of a run."""

    model_dir: Path
    prompts_dir: Path
    num_parameters: int


def fine_tuned_policy(folder: Path, model: ModelConfig, *, num_epochs: float) -> Policy:
    """Fine-tune a policy with the repository's own SFT on the embedded world, without a cluster."""
    sft = SftConfig(batch_size=64, num_epochs=num_epochs, checkpoint_every_steps=10**6)
    config, layout = PipelineConfig(name="policy", seed=SEED, world=WORLD, model=model, sft=sft), RunLayout(folder)
    chat = _write_base(config, layout)
    demonstrations = [row for row in _rows(layout, "sft.jsonl") if _fits(chat, row["prompt"], row["completion"])]
    write_token_groups(layout.sft_tokens / "scenario=sft", demonstrations, kind=RowKind.DEMONSTRATION, chat=chat)
    with patch.dict(os.environ, PASSIVE):
        process = mp.get_context("spawn").Process(target=train_sft, args=(config, folder))
        process.start()
    process.join()
    if process.exitcode:
        sys.exit(f"bench-rloo: fine-tuning failed with status {process.exitcode}, see above")
    return _with_prompts(layout, chat, layout.sft_checkpoint)


def _write_base(config: PipelineConfig, layout: RunLayout) -> ChatFormat:
    """Write the world and sft/base, which has random weights and a tokenizer made from the world's text."""
    write_world(layout.world, config.world, seed=config.seed)
    texts = [text for row in _rows(layout, "sft.jsonl") for text in (row["prompt"], row["completion"])]
    save_base_model(
        layout.base_model, config.model, make_tokenizer(texts, vocab_size=config.model.vocab_size), seed=config.seed
    )
    return ChatFormat.load(layout.base_model)


def _with_prompts(layout: RunLayout, chat: ChatFormat, model_dir: Path) -> Policy:
    prompts = [row for row in _rows(layout, "rloo_prompts.jsonl") if _fits(chat, row["prompt"])]
    write_token_groups(layout.rloo_prompts / "scenario=rloo_prompts", prompts, kind=RowKind.PROMPT, chat=chat)
    num_parameters = sum(parameter.numel() for parameter in load_policy(model_dir, dtype=torch.float32).parameters())
    return Policy(model_dir, layout.rloo_prompts, num_parameters)


def _rows(layout: RunLayout, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (layout.world / name).read_text().splitlines()]


def _fits(chat: ChatFormat, prompt: str, completion: str = "") -> bool:
    return len(chat.prompt_ids(prompt)) <= MAX_TOKENS and len(chat.completion_ids(completion)) <= MAX_TOKENS
