"""A tokenizer and a small Qwen2 made from nothing but the run's own text, for machines without any weights."""

from collections.abc import Iterable
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from rm_robust.config import ModelConfig

PAD, TURN_START, TURN_END = "<|pad|>", "<|im_start|>", "<|im_end|>"
INITIALIZER_RANGE = 0.06
"""Standard deviation of the initial weights. 0.02, usual for wide models, starves one of 128 columns: after 262 steps on the embedded world
the sampled answers scored 0.28 (gold) with 0.02 and 0.58 with 0.06."""
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def make_tokenizer(texts: Iterable[str], *, vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE over `texts` with a ChatML template; pad, turn start and turn end are three different special tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, TURN_START, TURN_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*texts, "system\nuser\nassistant\n"], trainer)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, eos_token=TURN_END, additional_special_tokens=[TURN_START])
    wrapped.chat_template = CHATML
    return wrapped


def save_base_model(folder: Path, config: ModelConfig, tokenizer: PreTrainedTokenizerFast, *, seed: int) -> None:
    """A randomly initialised Qwen2 (tied embeddings, as Qwen2.5-0.5B/1.5B) and its tokenizer as a Hugging Face directory."""
    torch.manual_seed(seed)
    architecture = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        max_position_embeddings=config.max_position_embeddings,
        tie_word_embeddings=True,
        initializer_range=INITIALIZER_RANGE,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    Qwen2ForCausalLM(architecture).save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))
