"""Turn a reward model from elsewhere into a checkpoint to serve: `python -m rm_robust.models.adopt SOURCE TARGET`.

SOURCE is a Hugging Face directory on this machine. It is loaded once to check that its head, its weights and its chat
template are known and complete, and that a short conversation gets the scores of the model's own code. Its files are
then committed to TARGET unchanged, as hard links where the file system allows them, with the manifest that the
checkpoints of rm_robust have.
"""

import argparse
import logging
import os
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path

import torch

from rm_robust.data.chat import ChatFormat
from rm_robust.errors import CheckpointError, RmRobustError
from rm_robust.models.adopt_arguments import add_arguments
from rm_robust.models.architectures import (
    is_left_by_training,
    known_architecture,
    load_packed_reward_model,
    visible_files,
)
from rm_robust.models.checkpoint import MANIFEST_NAME, Manifest, commit_checkpoint, read_json
from rm_robust.runs.directory import require_lasting

logger = logging.getLogger(__name__)


def main(options: argparse.Namespace) -> int:
    """Adopt the model that the options name, and return the exit status."""
    try:
        require_lasting(options.target, f"TARGET {options.target}")
        manifest = adopt(options.source, options.target)
    except RmRobustError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(
        f"{options.target} is a reward-model checkpoint: {manifest.content_sha256}, template {manifest.template_sha256}"
    )
    return 0


def adopt(source: Path, target: Path) -> Manifest:
    """Commit the files of a foreign model, unchanged, as a reward-model checkpoint.

    Raises CheckpointError or ChatTemplateError, and then writes nothing.
    """
    if target.exists():
        raise CheckpointError(f"{target} exists already. Name a new directory, or delete that one.")
    if (source / MANIFEST_NAME).exists():
        raise CheckpointError(f"{source} is a checkpoint of rm_robust already. Serve it as it is.")
    known_architecture(source)
    chat = ChatFormat.load(source)
    check_scored_position(source, chat)
    load_packed_reward_model(source, chat, dtype=torch.bfloat16, device=torch.device("cpu"))
    files = [path for path in visible_files(source) if not is_left_by_training(path)]
    for path in visible_files(source):
        if path not in files:
            logger.warning("%s is left out: it belongs to the training, and no score needs it", path)

    def write(folder: Path) -> None:
        copy_files(files, source, folder)

    return commit_checkpoint(
        target, write, kind="reward_model", template_sha256=chat.template_sha256, training={"adopted_from": str(source)}
    )


def check_scored_position(source: Path, chat: ChatFormat) -> None:
    """Check that other programs read a score at the same token as rm_robust, the end-of-turn token.

    Other programs read it at the last token before padding. Raises CheckpointError where that is another token.
    """
    end = chat.tokenizer.convert_ids_to_tokens(chat.end_of_turn_id)
    if chat.text_after_turn:
        raise CheckpointError(
            f"The chat template in {source} writes {chat.text_after_turn!r} after the last {end!r}. "
            f"Other programs read the score after that text, and rm_robust reads it at {end!r}: the two scores differ. "
            f"If the model was trained at {end!r}, save a template there that ends with it."
        )
    pad_id = read_json(source / "config.json").get("pad_token_id")
    if pad_id in {chat.end_of_turn_id, *chat.header_ids}:
        raise CheckpointError(
            f"{source}/config.json has pad_token_id = {pad_id}, {chat.tokenizer.convert_ids_to_tokens(pad_id)!r}, "
            "which the chat template writes into every conversation. The model's own code then reads the score before "
            f"that token, and rm_robust reads it at the last {end!r}. Set pad_token_id as it was in training."
        )


def copy_files(files: Iterable[Path], source: Path, folder: Path) -> None:
    """Put files of the directory `source` into `folder`, as hard links where the file system allows them."""
    for path in files:
        copy = folder / path.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        link_or_copy(path.resolve(), copy)  # the hub's cache consists of symbolic links


def link_or_copy(path: Path, copy: Path) -> None:
    try:
        os.link(path, copy)
    except OSError:  # TARGET is on another file system, or on one without hard links
        shutil.copy2(path, copy)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        prog="python -m rm_robust.models.adopt",
        description="Turn a reward model's Hugging Face directory into a checkpoint that can be served. "
        "Needs as much memory as the model in bfloat16.",
    )
    add_arguments(parser)
    sys.exit(main(parser.parse_args()))
