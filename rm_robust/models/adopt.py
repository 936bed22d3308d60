"""Make a checkpoint of a reward model from elsewhere, so that it can be served: `python -m rm_robust.models.adopt SOURCE TARGET`.

SOURCE is a Hugging Face directory on this machine. It is loaded once to see that its head, its weights and its chat template are known and whole; its files
are then committed to TARGET as they are, by hard links where the file system allows, with the manifest that rm_robust's own checkpoints have.
"""

import argparse
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from rm_robust.data.chat import ChatFormat
from rm_robust.errors import CheckpointError, RmRobustError
from rm_robust.models.architectures import known_architecture, load_packed_reward_model, visible_files
from rm_robust.models.checkpoint import MANIFEST_NAME, Manifest, commit_checkpoint, read_json
from rm_robust.runs.directory import require_lasting


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m rm_robust.models.adopt",
        description="Make a checkpoint that can be served from a reward model's Hugging Face directory. Needs as much memory as the model in bfloat16.",
    )
    parser.add_argument(
        "source", type=Path, help="local directory: config.json, safetensors, tokenizer with its chat template"
    )
    parser.add_argument("target", type=Path, help="the checkpoint to write; must not exist")
    parsed = parser.parse_args(arguments)
    try:
        require_lasting(parsed.target, f"TARGET {parsed.target}")
        manifest = adopt(parsed.source, parsed.target)
    except RmRobustError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(
        f"{parsed.target} is a reward-model checkpoint: {manifest.content_sha256}, template {manifest.template_sha256}"
    )
    return 0


def adopt(source: Path, target: Path) -> Manifest:
    """Commit a foreign model's files, unaltered, as a reward-model checkpoint. Raises CheckpointError or ChatTemplateError, and then writes nothing."""
    if target.exists():
        raise CheckpointError(f"{target} exists already. Name a new directory, or delete that one.")
    if (source / MANIFEST_NAME).exists():
        raise CheckpointError(f"{source} is a checkpoint of rm_robust already. Serve it as it is.")
    known_architecture(source)
    chat = ChatFormat.load(source)
    check_scored_position(source, chat)
    load_packed_reward_model(source, chat, dtype=torch.bfloat16, device=torch.device("cpu"))
    files = visible_files(source)

    def write(folder: Path) -> None:
        for path in files:
            copy = folder / path.relative_to(source)
            copy.parent.mkdir(parents=True, exist_ok=True)
            link_or_copy(path.resolve(), copy)  # the hub's cache holds symbolic links

    return commit_checkpoint(
        target, write, kind="reward_model", template_sha256=chat.template_sha256, training={"adopted_from": str(source)}
    )


def check_scored_position(source: Path, chat: ChatFormat) -> None:
    """Scores are read at the end-of-turn token here. Elsewhere they are read at the last token before padding: raises CheckpointError where that is another."""
    end = chat.tokenizer.convert_ids_to_tokens(chat.end_of_turn_id)
    if chat.text_after_turn:
        raise CheckpointError(
            f"The chat template in {source} writes {chat.text_after_turn!r} after the last {end!r}. Other programs read the score at the end of that, and "
            f"rm_robust at {end!r}: two different scores. If the model was trained at {end!r}, save a template there that ends in it."
        )
    pad_id = read_json(source / "config.json").get("pad_token_id")
    if pad_id in {chat.end_of_turn_id, *chat.header_ids}:
        raise CheckpointError(
            f"{source}/config.json has pad_token_id = {pad_id}, {chat.tokenizer.convert_ids_to_tokens(pad_id)!r}, which the chat template writes into every "
            f"conversation: the model's own code then reads the score before it, and rm_robust at the last {end!r}. Set it as the model was trained."
        )


def link_or_copy(path: Path, copy: Path) -> None:
    try:
        os.link(path, copy)
    except OSError:  # another file system, or one without links
        shutil.copy2(path, copy)


if __name__ == "__main__":
    sys.exit(main())
