"""Tiny random models for tests: real architectures, no tokenizer, the same weights for the same seed."""

from pathlib import Path

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

VOCABULARY_SIZE = 512


def tiny_qwen2_config(*, tie_word_embeddings: bool) -> Qwen2Config:
    """About 0.3 M parameters. Heads of 32: vLLM's smallest on CPU."""
    return Qwen2Config(
        vocab_size=VOCABULARY_SIZE,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=tie_word_embeddings,
        initializer_range=0.08,  # large enough that greedy continuations depend on the prompt
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )


def save_tiny_qwen2(directory: Path, *, tie_word_embeddings: bool, seed: int = 0) -> Path:
    """Save a random causal LM as a Hugging Face directory without a tokenizer."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Qwen2ForCausalLM(tiny_qwen2_config(tie_word_embeddings=tie_word_embeddings))
    model.save_pretrained(directory)
    return directory
