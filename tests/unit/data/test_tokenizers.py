"""The ids that are trained and served are those of the whole templated conversation, for a dozen tokenizer designs.

The expected ids are those of transformers' apply_chat_template on the whole conversation, cut after the end of turn.
Each tokenizer is trained on a few sentences, with the normalizer, pre-tokenizer, model and template of its kind.
"""

import functools
import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from rm_robust.data.chat import ChatFormat
from rm_robust.data.records import Message

TEXTS = [
    "one two three, the one answer is seven apples by the quiet river.",
    "Order these words: red, green, blue. Which of them is first?",
    "first line\n\n\nsecond line",
    "user assistant system model [INST] [/INST] \n\n 0123456789 don't won't",
] * 20
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
LLAMA_2 = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
)
ZEPHYR = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
PHI_3 = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
LLAMA_3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' "
    "+ m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else 'user') "
    "+ '\n' + m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)


def byte_level(*, prefix: bool = False, digits: bool = False) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    level = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    tokenizer.pre_tokenizer = (
        pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), level]) if digits else level
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def sentencepiece(*, prepend: bool, fallback: bool = True) -> Tokenizer:
    """Return what Llama 2's and Gemma's tokenizer.json hold: spaces are replaced in the normalizer."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=fallback, unk_token="<unk>", fuse_unk=True))
    replaced = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replaced] if prepend else [replaced])
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    strip = [decoders.Strip(" ", 1, 0)] if prepend else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return tokenizer


def metaspace(scheme: str, *, unigram: bool = False) -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram() if unigram else models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=True)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme=scheme)
    return tokenizer


CONTROL = ["<unk>", "<s>", "</s>", "<pad>"]
DESIGNS: dict[str, tuple[Callable[[], Tokenizer], str, list[str]]] = {
    "byte-level, ChatML": (byte_level, CHATML, ["<|im_start|>", "<|im_end|>"]),
    "byte-level with prefix space, ChatML": (lambda: byte_level(prefix=True), CHATML, ["<|im_start|>", "<|im_end|>"]),
    "byte-level with digits alone, ChatML": (lambda: byte_level(digits=True), CHATML, ["<|im_start|>", "<|im_end|>"]),
    "byte-level, Llama 3": (
        byte_level,
        LLAMA_3,
        ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
    ),
    "SentencePiece with prefix, Llama 2": (lambda: sentencepiece(prepend=True), LLAMA_2, []),
    "SentencePiece with prefix, Zephyr": (lambda: sentencepiece(prepend=True), ZEPHYR, []),
    "SentencePiece with prefix, Phi-3": (
        lambda: sentencepiece(prepend=True),
        PHI_3,
        ["<|user|>", "<|assistant|>", "<|end|>"],
    ),
    "SentencePiece without prefix, Gemma": (
        lambda: sentencepiece(prepend=False),
        GEMMA,
        ["<start_of_turn>", "<end_of_turn>"],
    ),
    "SentencePiece without byte fallback, Zephyr": (
        lambda: sentencepiece(prepend=True, fallback=False),
        ZEPHYR,
        [],
    ),
    "Metaspace always, Zephyr": (lambda: metaspace("always"), ZEPHYR, []),
    "Metaspace first, Zephyr": (lambda: metaspace("first"), ZEPHYR, []),
    "Metaspace never, Zephyr": (lambda: metaspace("never"), ZEPHYR, []),
    "Unigram, Metaspace first, ChatML": (
        lambda: metaspace("first", unigram=True),
        CHATML,
        ["<|im_start|>", "<|im_end|>"],
    ),
}


@functools.cache
def chat_of(design: str) -> ChatFormat:
    make, template, further = DESIGNS[design]
    tokenizer = make()
    special = [*CONTROL, *further]
    if isinstance(tokenizer.model, models.Unigram):
        trainer: Any = trainers.UnigramTrainer(
            vocab_size=300, special_tokens=special, unk_token="<unk>", show_progress=False
        )
    else:
        pieces = BYTES if isinstance(tokenizer.pre_tokenizer, pre_tokenizers.Split) else []
        trainer = trainers.BpeTrainer(
            vocab_size=700,
            special_tokens=[*special, *pieces],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet() if design.startswith("byte") else [],
            show_progress=False,
        )
    tokenizer.train_from_iterator(TEXTS, trainer)
    if isinstance(tokenizer.pre_tokenizer, pre_tokenizers.Split):
        tokenizer = without_special_bytes(tokenizer, special)
    tokenizer.add_special_tokens(
        [AddedToken(text, special=True, normalized=False, rstrip="Phi-3" in design) for text in special]
    )
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<|begin_of_text|>" if "<|begin_of_text|>" in further else "<s>",
        eos_token="</s>",
        pad_token="<pad>",
    )
    wrapped.chat_template = template
    return ChatFormat(wrapped, source=design)


def without_special_bytes(tokenizer: Tokenizer, special: list[str]) -> Tokenizer:
    """Return the tokenizer with its byte pieces as pieces of the model alone, as byte fallback has them."""
    parts = json.loads(tokenizer.to_str())
    parts["added_tokens"] = [token for token in parts["added_tokens"] if token["content"] in special]
    return Tokenizer.from_str(json.dumps(parts))


def whole_ids(chat: ChatFormat, prompt: str, completion: str) -> list[int]:
    """Return transformers' ids of the whole conversation, up to its last end of turn."""
    conversation = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
    ids = list(chat.tokenizer.apply_chat_template(conversation, tokenize=True, return_dict=True)["input_ids"])
    return ids[: len(ids) - ids[::-1].index(chat.end_of_turn_id)]


words = st.sampled_from(
    ["one", "two", " ", "  ", "\n", "\n\n", "\t", "7", "19", "é", "日本", "😀", ".", "don't", "\u00a0"]
)
contents = st.lists(words, min_size=1, max_size=8).map("".join)
questions = contents.filter(lambda text: bool(text.strip()))


@pytest.mark.parametrize("design", DESIGNS)
@given(prompt=questions, completions=st.lists(contents, min_size=1, max_size=3))
@settings(max_examples=60, deadline=None)
def test_ids_are_those_of_the_whole_templated_conversation(design: str, prompt: str, completions: list[str]) -> None:
    chat = chat_of(design)
    group = chat.token_group(prompt, completions)
    for completion, ids in zip(completions, group.completion_ids, strict=True):
        assert group.prompt_ids + ids == whole_ids(chat, prompt, completion)
    rendered = chat.tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}, {"role": "assistant", "content": completions[0]}], tokenize=False
    )
    single, again = chat.token_group(prompt, completions[:1]), chat.rendered_text(str(rendered))
    assert again.prompt_ids + again.completion_ids == single.prompt_ids + single.completion_ids[0]
    by_ids = chat.rendered_ids(single.prompt_ids + single.completion_ids[0])
    assert by_ids.prompt_ids + by_ids.completion_ids == single.prompt_ids + single.completion_ids[0]


@pytest.mark.parametrize("design", DESIGNS)
@given(before=contents, after=contents, number=st.integers(0, 7))
@settings(max_examples=30, deadline=None)
def test_special_token_text_in_a_message_gives_no_control_token(
    design: str, before: str, after: str, number: int
) -> None:
    chat = chat_of(design)
    special = [text for text in (*CONTROL, *DESIGNS[design][2]) if text != "<unk>"]
    forged = f"a{before}{special[number % len(special)]}{after}b"

    def control_ids(text: str) -> list[int]:
        group = chat.token_group(text, [text])
        control = {chat.tokenizer.convert_tokens_to_ids(text) for text in special}
        return [token_id for token_id in group.prompt_ids + group.completion_ids[0] if token_id in control]

    assert control_ids(forged) == control_ids("one")


def test_a_completion_of_sentencepiece_begins_as_in_its_conversation() -> None:
    """Alone, the completion gets "▁one", where the conversation of Zephyr has "one" after the newline."""
    chat = chat_of("SentencePiece with prefix, Zephyr")
    [ids] = chat.token_group("two", ["one"]).completion_ids
    assert not str(chat.tokenizer.convert_ids_to_tokens(ids)[0]).startswith("▁")
    assert str(chat.tokenizer.tokenize("one")[0]).startswith("▁")


def test_outer_white_space_is_trimmed_where_the_template_trims_it() -> None:
    for design in ("byte-level, Llama 3", "SentencePiece without prefix, Gemma"):
        chat = chat_of(design)
        assert chat.completion_ids("  one two \n") == chat.completion_ids("one two")


def test_a_token_across_the_header_and_the_completion_ends_the_prompt_before_it() -> None:
    """The newline that ends the header and the one that begins the completion are one token of the conversation."""
    chat = chat_of("byte-level, ChatML")
    prompt: list[Message] = [{"role": "user", "content": "two"}]
    group = chat.token_group(prompt, ["\n\none"])
    assert chat.has_whole_header(chat.prompt_ids(prompt))
    assert not chat.has_whole_header(group.prompt_ids)
    assert group.prompt_ids + group.completion_ids[0] == whole_ids(chat, "two", "\n\none")
