"""A committed reward model is read alike by us and by others; make test-compat tries the others themselves."""

import json
from pathlib import Path

import pytest
from transformers import AutoConfig, AutoTokenizer

from rm_robust.data.chat import ChatFormat
from rm_robust.models.export import add_no_second_bos, ending_at_the_score, write_for_transformers_4
from tests.support.tiny_models import tiny_tokenizer
from tests.support.trained_reward_model import ROPE_THETA, texts, train_and_commit
from tests.unit.data.test_chat import llama

CHATML = ChatFormat(tiny_tokenizer(), source="tiny")
CONVERSATION = [{"role": "user", "content": "red?"}, {"role": "assistant", "content": "blue\n"}]


def test_the_saved_template_ends_where_the_score_is_read_and_prompts_keep_their_ids() -> None:
    assert CHATML.text_after_turn == "\n"
    ours, theirs = CHATML.tokenizer.apply_chat_template, ending_at_the_score(CHATML).tokenizer.apply_chat_template
    assert ours(CONVERSATION, tokenize=False) == theirs(CONVERSATION, tokenize=False) + "\n"
    for turns, is_prompt in (([CONVERSATION[0]], True), ([*CONVERSATION, CONVERSATION[0]], True)):
        assert ours(turns, tokenize=False, add_generation_prompt=is_prompt) == theirs(
            turns, tokenize=False, add_generation_prompt=is_prompt
        )
    scored = ending_at_the_score(CHATML)
    assert scored.prompt_ids("red?") + scored.completion_ids("blue\n") == CHATML.prompt_ids(
        "red?"
    ) + CHATML.completion_ids("blue\n")
    assert scored.completion_ids("x")[-1] == CHATML.end_of_turn_id


def test_a_template_that_ends_there_already_is_kept() -> None:
    scored = ending_at_the_score(CHATML)
    assert scored.text_after_turn == ""
    assert ending_at_the_score(scored) is scored


@pytest.mark.parametrize("with_lora", [False, True])
def test_both_versions_of_transformers_find_their_keys(with_lora: bool, tmp_path: Path) -> None:
    checkpoint = train_and_commit(tmp_path, with_lora=with_lora)
    config = json.loads((checkpoint / "config.json").read_text())
    assert (config["rope_theta"], config["rope_scaling"]) == (ROPE_THETA, None)
    assert AutoConfig.from_pretrained(checkpoint).rope_parameters == {"rope_type": "default", "rope_theta": ROPE_THETA}
    tokenizer = json.loads((checkpoint / "tokenizer_config.json").read_text())
    assert tokenizer["tokenizer_class"] != "TokenizersBackend"
    assert not isinstance(tokenizer.get("extra_special_tokens"), list)
    prompt, chosen, _ = texts(0)
    base, saved = ChatFormat.load(tmp_path / "base"), ChatFormat.load(checkpoint)
    assert saved.prompt_ids(prompt) + saved.completion_ids(chosen) == base.prompt_ids(prompt) + base.completion_ids(
        chosen
    )
    assert (
        AutoTokenizer.from_pretrained(checkpoint)
        .apply_chat_template(CONVERSATION, tokenize=False)
        .endswith("<|im_end|>")
    )


def test_rope_scaling_is_written_where_there_is_some(tmp_path: Path) -> None:
    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "rope_theta": 1e6}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2", "rope_parameters": rope}))
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "TokenizersBackend", "extra_special_tokens": ["<a>"]})
    )
    write_for_transformers_4(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["rope_theta"] == 1e6
    assert config["rope_scaling"] == {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
    assert config["rope_parameters"] == rope
    tokenizer = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert tokenizer == {"tokenizer_class": "PreTrainedTokenizerFast", "additional_special_tokens": ["<a>"]}


def test_a_template_that_writes_bos_is_not_given_a_second_one_by_the_saved_tokenizer(tmp_path: Path) -> None:
    """reward-bench renders a conversation to text and tokenises that."""
    chat = llama()
    conversation = [{"role": "user", "content": "red?"}, {"role": "assistant", "content": "blue"}]
    chat.tokenizer.save_pretrained(tmp_path)
    text = chat.tokenizer.apply_chat_template(conversation, tokenize=False)
    trained_on = chat.prompt_ids("red?") + chat.completion_ids("blue")
    assert AutoTokenizer.from_pretrained(tmp_path)(text)["input_ids"] == [chat.tokenizer.bos_token_id, *trained_on]
    add_no_second_bos(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path)(text)["input_ids"] == trained_on
