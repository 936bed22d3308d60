"""Write a reward-model checkpoint with which other programs score as we do.

The other programs are transformers 5 and 4, vLLM and reward-bench.
"""

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
from rm_robust.runs import files as run_files


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
    """Commit trained weights with their tokenizer.

    `state` holds whole weights under the names of `model`. With `lora`, they are merged into the weights of `base_dir`.
    """
    scored = ending_at_the_score(chat)

    def write(folder: Path) -> None:
        if lora:
            untrained = new_reward_model(base_dir, pad_id=chat.pad_id, seed=0)  # the trained head replaces its head
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
    """Return the same format with a template that writes nothing after the end of the last turn.

    Programs that render a conversation themselves read the score at its last token. That of ChatML is a newline, at
    which no score was trained. Prompts and completions keep their ids.
    """
    if not chat.text_after_turn:
        return chat
    tokenizer = copy.deepcopy(chat.tokenizer)
    rendered = f"{{% set conversation %}}{tokenizer.chat_template}{{% endset %}}"
    cut = f"conversation.removesuffix({json.dumps(chat.text_after_turn)})"
    tokenizer.chat_template = f"{rendered}{{{{ conversation if add_generation_prompt else {cut} }}}}"
    return ChatFormat(tokenizer, source=chat.source)


def add_no_second_bos(folder: Path) -> None:
    """Keep the saved tokenizer from putting a second begin-of-sequence token before the one that the template writes.

    Programs that render a conversation to text and then tokenise it (reward-bench) would get both. Our own code never
    lets the tokenizer add one.
    """
    tokenizer = _read(folder / "tokenizer.json")
    tokenizer["post_processor"] = None
    run_files.write_json(folder / "tokenizer.json", tokenizer)
    config = _read(folder / "tokenizer_config.json")
    if "add_bos_token" in config:
        config["add_bos_token"] = False
        run_files.write_json(folder / "tokenizer_config.json", config)


def write_for_transformers_4(folder: Path) -> None:
    """Add what transformers 4 reads to the files of transformers 5, which reads them as before.

    RoPE: `rope_theta` and `rope_scaling` beside `rope_parameters`; without them, version 4 silently takes its default.
    Tokenizer: a class name that version 4 knows, and extra special tokens under their former key.
    """
    config = _read(folder / "config.json")
    rope = config.get("rope_parameters")
    if rope and "rope_theta" in rope:
        config["rope_theta"] = rope["rope_theta"]
        scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
        config["rope_scaling"] = None if scaling.get("rope_type", "default") == "default" else scaling
        run_files.write_json(folder / "config.json", config)
    tokenizer = _read(folder / "tokenizer_config.json")
    if tokenizer.get("tokenizer_class") == "TokenizersBackend":
        tokenizer["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(tokenizer.get("extra_special_tokens"), list):
        tokenizer["additional_special_tokens"] = tokenizer.pop("extra_special_tokens")
    run_files.write_json(folder / "tokenizer_config.json", tokenizer)


def _read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text())
    return content
