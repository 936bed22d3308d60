"""Train a tiny reward model for a few steps, and commit it as the product does: all weights, or merged adapters."""

from pathlib import Path
from random import Random

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from rm_robust.config.objectives import Objective
from rm_robust.config.shared import OptimizerConfig
from rm_robust.config.training import LoraConfig, RewardModelConfig
from rm_robust.data.chat import ChatFormat
from rm_robust.data.records import PreferencePair, TokenGroup
from rm_robust.models.export import commit_reward_model
from rm_robust.models.lora import add_adapters
from rm_robust.models.packing import Layout
from rm_robust.models.reward_model import PackedRewardModel, new_reward_model
from rm_robust.training.engines.ddp import DdpEngine
from rm_robust.training.reward_model.step import StepSettings, reward_model_step
from tests.support.tiny_models import TEXT, tiny_tokenizer

ROPE_THETA = 500.0
"""A RoPE theta far from the default of 10,000: a reader that ignores it gives other scores."""
NUM_PAIRS = 6


def texts(seed: int) -> tuple[str, str, str]:
    """Return a prompt, a chosen and a rejected completion."""
    rng = Random(seed)
    prompt, chosen, rejected = (" ".join(rng.choices(TEXT.split(), k=rng.randint(3, 12))) for _ in range(3))
    return prompt, chosen, rejected


def train_and_commit(folder: Path, *, with_lora: bool) -> Path:
    """Train a reward model with RoPE's theta at ROPE_THETA, and commit it below `folder`.

    Its scores spread by more than 0.5.
    """
    tokenizer, base, target = tiny_tokenizer(), folder / "base", folder / "trained"
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.1,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    Qwen2ForCausalLM(config).save_pretrained(base)
    tokenizer.save_pretrained(base)
    chat = ChatFormat.load(base)
    model = new_reward_model(base, pad_id=chat.pad_id, seed=0)
    lora = LoraConfig(rank=4) if with_lora else None
    if lora:
        add_adapters(model, lora)
    packed = PackedRewardModel(model, Layout.SEGMENTS)
    engine = DdpEngine(packed, optimizer=OptimizerConfig(), device=torch.device("cpu"))
    pairs = [
        PreferencePair(TokenGroup(chat.prompt_ids(p), [chat.completion_ids(c), chat.completion_ids(r)]))
        for p, c, r in map(texts, range(NUM_PAIRS))
    ]
    for _ in range(8):
        settings = StepSettings(RewardModelConfig(objective=Objective.BRADLEY_TERRY), 10_000, chat.pad_id)
        reward_model_step(engine, pairs, settings, model=packed, device=torch.device("cpu"))
        engine.step(1e-2)
    state = {name.removeprefix("model."): tensor for name, tensor in engine.full_state_dict().items()}
    commit_reward_model(target, model, state, chat, base_dir=base, lora=lora, training={})
    return target
