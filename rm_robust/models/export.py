"""The files of a reward-model checkpoint, such that other programs score as we do: transformers 5 and 4, vLLM, reward-bench."""

import copy
import json
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from rm_robust.config.training import LoraConfig
from rm_robust.data.chat import ChatFormat
from rm_robust.models.checkpoint import Manifest, commit_checkpoint
from rm_robust.models.lora import add_adapters, save_merged
from rm_robust.models.reward_model import new_reward_model
from rm_robust.runs.storage.commits import write_json_atomic


def commit_reward_model(
    target: Path,
    model: PreTrainedModel,
    state: dict[str, Tensor],
    chat: ChatFormat,
    *,
    base_dir: Path | str,
    lora: LoraConfig | None,
    training: dict[str, str | int | float],
) -> Manifest:
    """Commit trained weights with their tokenizer. `state`: whole weights under `model`'s names; with `lora` they are merged into `base_dir`'s."""
    scored = ending_at_the_score(chat)

    def write(folder: Path) -> None:
        if lora:
            untrained = new_reward_model(
                base_dir, pad_id=chat.pad_id, seed=0
            )  # its head is replaced by the trained one
            save_merged(add_adapters(untrained, lora), state, folder)
        else:
            model.save_pretrained(str(folder), state_dict=state)
        scored.tokenizer.save_pretrained(str(folder))
        if chat.bos_ids:
            add_no_second_bos(folder)
        write_for_transformers_4(folder)

    return commit_checkpoint(
        target, write, kind="reward_model", template_sha256=scored.template_sha256, training=training
    )


def ending_at_the_score(chat: ChatFormat) -> ChatFormat:
    """The same format with a template that writes nothing after the last turn's end: programs that render a conversation themselves read the score
    at its last token (ChatML's is a newline, which no score was trained at). Prompts and completions keep their ids."""
    if not chat.text_after_turn:
        return chat
    tokenizer = copy.deepcopy(chat.tokenizer)
    whole = f"{{% set conversation %}}{tokenizer.chat_template}{{% endset %}}"
    tokenizer.chat_template = f"{whole}{{{{ conversation if add_generation_prompt else conversation.removesuffix({json.dumps(chat.text_after_turn)}) }}}}"
    return ChatFormat(tokenizer, source=chat.source)


def add_no_second_bos(folder: Path) -> None:
    """Programs that render a conversation to text and then tokenise it (reward-bench) get the begin-of-sequence token from the template: the saved
    tokenizer must not put another one before it. Our own path never lets it."""
    tokenizer = _read(folder / "tokenizer.json")
    tokenizer["post_processor"] = None
    write_json_atomic(folder / "tokenizer.json", tokenizer)
    config = _read(folder / "tokenizer_config.json")
    if "add_bos_token" in config:
        config["add_bos_token"] = False
        write_json_atomic(folder / "tokenizer_config.json", config)


def write_for_transformers_4(folder: Path) -> None:
    """Add what transformers 4 reads to the files of transformers 5, which reads them as before.

    RoPE: `rope_theta` and `rope_scaling` beside `rope_parameters`; without them version 4 silently takes its default. Tokenizer: a class name that
    version 4 knows, and extra special tokens under their former key.
    """
    config = _read(folder / "config.json")
    rope = config.get("rope_parameters")
    if rope and "rope_theta" in rope:
        config["rope_theta"] = rope["rope_theta"]
        scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
        config["rope_scaling"] = None if scaling.get("rope_type", "default") == "default" else scaling
        write_json_atomic(folder / "config.json", config)
    tokenizer = _read(folder / "tokenizer_config.json")
    if tokenizer.get("tokenizer_class") == "TokenizersBackend":
        tokenizer["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(tokenizer.get("extra_special_tokens"), list):
        tokenizer["additional_special_tokens"] = tokenizer.pop("extra_special_tokens")
    write_json_atomic(folder / "tokenizer_config.json", tokenizer)


def _read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text())
    return content
