"""Check a run's own tokenizer and model: deterministic, lossless on any text, and saved as plain transformers files."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from rm_robust.config.training import ModelConfig
from rm_robust.data.chat import ChatFormat
from rm_robust.data.demonstrations import make_tokenizer, save_base_model
from tests.support.tiny_models import TEXT, tiny_tokenizer

CONFIG = ModelConfig(
    hidden_size=64, intermediate_size=96, num_layers=2, num_heads=2, num_kv_heads=1, max_position_embeddings=64
)
TOKENIZER = tiny_tokenizer()


def test_pad_turn_start_and_turn_end_are_three_tokens_and_the_format_accepts_them() -> None:
    chat = ChatFormat(TOKENIZER, source="tiny")
    assert (chat.pad_id, chat.end_of_turn_id, TOKENIZER.eos_token_id) == (0, 2, 2)
    assert TOKENIZER.convert_tokens_to_ids("<|im_start|>") == 1


def test_the_vocabulary_has_the_asked_size_and_common_words_are_one_token() -> None:
    assert len(TOKENIZER) == 330
    assert len(make_tokenizer([TEXT] * 20, vocab_size=300)) == 300
    assert len(make_tokenizer(["red red red"] * 50, vocab_size=300)(" red", add_special_tokens=False)["input_ids"]) == 1


@given(st.text(max_size=40))
def test_any_text_comes_back_whole(text: str) -> None:
    ids = TOKENIZER(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert TOKENIZER.decode(ids, clean_up_tokenization_spaces=False) == text


def test_the_same_texts_make_the_same_tokenizer() -> None:
    assert tiny_tokenizer().get_vocab() == TOKENIZER.get_vocab()


def test_the_saved_model_has_the_configs_shape_and_depends_on_the_seed_alone(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        torch.rand(len(name))
        save_base_model(tmp_path / name, CONFIG, TOKENIZER, seed=seed)
    a, b, c = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in "abc")
    weights = [model.get_input_embeddings().weight for model in (a, b, c)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert weights[0].shape == (330, 64)
    assert a.get_output_embeddings().weight is a.get_input_embeddings().weight
    assert (a.config.num_hidden_layers, a.config.num_attention_heads, a.config.num_key_value_heads) == (2, 2, 1)
    assert (a.config.pad_token_id, a.config.bos_token_id, a.generation_config.eos_token_id) == (0, None, 2)


def test_the_default_model_has_one_to_three_million_parameters(tmp_path: Path) -> None:
    config = ModelConfig()
    tokenizer = make_tokenizer([TEXT] * 20, vocab_size=config.vocab_size)
    save_base_model(tmp_path, config, tokenizer, seed=0)
    num_missing = (config.vocab_size - len(tokenizer)) * config.hidden_size  # this short text has not enough merges
    num_parameters = AutoModelForCausalLM.from_pretrained(tmp_path).num_parameters() + num_missing
    assert 1e6 <= num_parameters <= 3e6


def test_chatml_is_what_is_saved_beside_the_model(tmp_path: Path) -> None:
    save_base_model(tmp_path, CONFIG, TOKENIZER, seed=0)
    text = ChatFormat.load(tmp_path).tokenizer.decode(
        ChatFormat.load(tmp_path).prompt_ids([{"role": "system", "content": "S"}, {"role": "user", "content": "U"}])
    )
    assert text == "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "generation_config.json"])
def test_the_base_model_directory_is_complete(tmp_path: Path, name: str) -> None:
    save_base_model(tmp_path, CONFIG, TOKENIZER, seed=0)
    assert (tmp_path / name).is_file()
